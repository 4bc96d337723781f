"""The results of a sweep: collect them in a small file, compare them, and write the pages of the study.

    mllm-jax study collect runs/preserve_or_compress --out docs/study/preserve_or_compress_mini.json
    mllm-jax study rates runs/rates --scale mini --out configs/preserve_or_compress_rates.json
    mllm-jax study latency runs/preserve_or_compress --out docs/study/preserve_or_compress_mini_latency.json
    mllm-jax study cost configs/preserve_or_compress.py --topology v5p-64 --out docs/study/cost.json
    mllm-jax study report docs/study/*.json --out docs

`collect` keeps of every finished run its scores question by question, curves and step times; it takes several sweeps
of one recipe, and summaries that it wrote before. `rates` chooses each connector's learning rate from a sweep of
`...-rates`. `latency` measures how long an answer and a training step take with one model of each cell, on this
machine, which should have nothing else to do. `cost` asks the planner what the cells cost at full scale. `report`
writes study.md, study.html, report.csv, report.json and charts from such files alone. See docs/sweep.md.
"""

import argparse
import json
import pathlib
from typing import Any

from mllm_jax.cli import shipped
from mllm_jax.console import complain
from mllm_jax.storage import Path, as_path, read_text

BUCKETS = ("",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax study`."""
    verbs = parser.add_subparsers(dest="verb", required=True)
    collect = verbs.add_parser("collect", help="finished runs of a sweep into a summary")
    collect.add_argument(
        "sources",
        nargs="+",
        metavar="SWEEP",
        help="a sweep's --workdir, or a summary that this command wrote before",
    )
    collect.add_argument("--out", required=True, metavar="FILE", help="the summary (JSON)")
    rates = verbs.add_parser("rates", help="choose each connector's learning rate")
    rates.add_argument("directory", metavar="SWEEP", help="the --workdir of a sweep of ...-rates")
    rates.add_argument("--scale", required=True, help="whose choices these are: mini or full")
    rates.add_argument(
        "--out", required=True, metavar="FILE", help="the file that the recipe reads; others' choices stay"
    )
    latency = verbs.add_parser("latency", help="measure how long answers and steps take")
    latency.add_argument("directory", metavar="SWEEP", help="the sweep's --workdir")
    latency.add_argument("--out", required=True, metavar="FILE", help="the times (JSON)")
    latency.add_argument(
        "--no-steps",
        action="store_true",
        help="answers only: where the runs' data or devices are not at hand",
    )
    cost = verbs.add_parser("cost", help="what the cells cost at full scale, from the planner")
    cost.add_argument("recipe", metavar="RECIPE", help="FILE.py, FILE.py:ARGUMENT, or a shipped one's NAME")
    cost.add_argument(
        "--connectors",
        metavar="NAME,...",
        default="",
        help="only these; +NAME adds one, as mllm-jax sweep does",
    )
    cost.add_argument("--topology", required=True, help="a TPU slice as v5p-64, or a host's GPUs as h100:8")
    cost.add_argument("--out", required=True, metavar="FILE", help="the costs (JSON)")
    report = verbs.add_parser("report", help="pages and charts from summaries and costs")
    report.add_argument("sources", nargs="+", metavar="FILE", help="of collect, latency and cost")
    report.add_argument("--out", required=True, metavar="DIR", help="folder of study.md and study.html")
    report.add_argument(
        "--baseline", metavar="CONNECTOR", help="that others are compared with (default mlp2x_gelu)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the verb; 1 with a message if something cannot be read."""
    from mllm_jax.evaluation.report.runs import ReportError  # slow to import: matplotlib
    from mllm_jax.interop.saved_params import CheckpointError
    from mllm_jax.schema import ConfigError

    try:
        verbs = {
            "collect": _collect,
            "rates": _rates,
            "latency": _latency,
            "cost": _cost,
            "report": _report,
        }
        return verbs[args.verb](args)
    except (ReportError, ConfigError, CheckpointError, OSError) as error:
        complain(f"mllm-jax study {args.verb}: {error}")
        return 1


def _collect(args: argparse.Namespace) -> int:
    from mllm_jax.evaluation.study.summary import merge, read_summary

    summaries = {}
    for source in args.sources:
        path = as_path(source)
        summaries[source] = _summary(path) if path.is_dir() else read_summary(path)
    found = merge(summaries)
    _write(args.out, json.dumps(found, separators=(",", ":")).replace('{"name"', '\n{"name"'))
    for name, why in found["left_out"].items():
        complain(f"{name} is left out: {why}")
    print(f"{args.out}: {len(found['runs'])} runs")
    return 0


def _finished(directory: Path) -> list[tuple[dict[str, Any], Path]]:
    """(note, work directory) of a sweep's evaluated runs, in the order of the recipe's cells.

    Raises:
      ReportError: there are none.
    """
    from mllm_jax.evaluation.report.runs import ReportError
    from mllm_jax.sweep.cells import CELLS, RUNS
    from mllm_jax.sweep.claims import NOTE

    notes = [_note(path) for path in (directory / CELLS).glob(f"*/{NOTE}")]
    notes.sort(key=lambda note: (note["order"], note["seed"]))
    runs = [(note, directory / RUNS / note["name"]) for note in notes]
    done = [(note, run) for note, run in runs if (run / "eval" / "summary.json").exists()]
    if not done:
        raise ReportError(
            f"{directory} holds no finished run of a sweep; give the --workdir of `mllm-jax sweep` (of cells that ran "
            "by --emit, that command without --emit takes note)"
        )
    if len(done) < len(notes):
        complain(f"{len(notes) - len(done)} of {len(notes)} runs are not evaluated yet, and left out")
    return done


def _note(path: Path) -> dict[str, Any]:
    """What a sweep noted of a cell."""
    from mllm_jax.evaluation.report.runs import ReportError
    from mllm_jax.evaluation.report.shapes import check_shape

    try:
        note = json.loads(read_text(path))
        check_shape(
            note,
            {"name": str, "variant": str, "seed": int, "order": int, "overrides": {}, "recipe": str},
            "it",
        )
    except ValueError as error:
        raise ReportError(f"{path} is damaged: {error}; the sweep's command writes it again") from None
    return note


def _summary(directory: Path) -> dict[str, Any]:
    """The summary of a sweep's finished runs."""
    from mllm_jax.evaluation.report.runs import ReportError
    from mllm_jax.evaluation.study.findings import as_dicts
    from mllm_jax.evaluation.study.summary import recipe_name, summarize
    from mllm_jax.sweep.cells import load_recipe
    from mllm_jax.sweep.rates import SUFFIX

    done = _finished(directory)
    last = done[-1][0]
    recipe = last["recipe"]
    for note, _ in done:
        if recipe_name(note) != recipe_name(last):
            raise ReportError(
                f"{directory} holds cells of {note['recipe']} ({note['name']}) and of {recipe} ({last['name']}); a "
                "study is of one recipe, so give each a --workdir of its own"
            )
    path, _, argument = recipe.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        file = shipped.home() / "configs" / file.name
    if not file.is_file():
        complain(
            f"{path} is not here, so nothing is asked of the results; run this where the sweep was started"
        )
    module = load_recipe(file) if file.is_file() else None
    function = getattr(module, "get_findings", lambda argument="": [])
    findings = as_dicts(function(argument) if argument else function())
    return summarize(recipe, done, findings, "rates" if argument.endswith(SUFFIX) else "study")


def _latency(args: argparse.Namespace) -> int:
    from mllm_jax.evaluation.study.latency import device_name, latency, step_times
    from mllm_jax.evaluation.study.summary import FORMAT
    from mllm_jax.inference.load import load
    from mllm_jax.parallel import cpu_devices
    from mllm_jax.workdir import saved_config

    found, cells, part = _finished(as_path(args.directory)), {}, f"{args.out}.part"
    if not args.no_steps:
        cpu_devices.divide(saved_config(found[0][1]).mesh.cpu_devices)
    for note, run in found:
        if note["variant"] in cells:
            continue
        model = load(run)
        times = latency(model) | ({} if args.no_steps else step_times(run, model))
        cells[note["variant"]] = times
        summary = {"format": FORMAT, "kind": "latency", "recipe": note["recipe"], "device": device_name()}
        _write(part, json.dumps({**summary, "cells": cells}, indent=1))  # after each: they take a while
        print(
            note["variant"], ", ".join(f"{key} {seconds:.4f}" for key, seconds in times.items()), flush=True
        )
    pathlib.Path(part).replace(args.out)  # only now, so that a stopped command leaves what was there
    return 0


def _write(out: str, text: str) -> None:
    from mllm_jax import files

    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, text + "\n")


def _rates(args: argparse.Namespace) -> int:
    from mllm_jax.evaluation.report.runs import ReportError
    from mllm_jax.evaluation.study.rates import choose, untried
    from mllm_jax.evaluation.study.results import Study
    from mllm_jax.evaluation.study.summary import merge
    from mllm_jax.sweep.rates import SUFFIX, read

    out = pathlib.Path(args.out)
    read(out, args.scale)  # refuses a damaged file
    summary = merge({args.directory: _summary(as_path(args.directory))})
    argument = summary["recipe"].partition(":")[2]
    if argument != args.scale + SUFFIX:
        raise ReportError(
            f"{args.directory} is a sweep of {summary['recipe']}, not of the rates of scale {args.scale!r}, which is "
            f"...:{args.scale}{SUFFIX}"
        )
    held = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    chosen = choose(Study(summary))
    held[args.scale] = {**held.get(args.scale, {}), **chosen}
    _write(args.out, json.dumps(held, indent=1, sort_keys=True))
    for cell, choice in chosen.items():
        side = untried(choice)
        hint = f"; none {side} was tried, so the best may lie beyond" if side else ""
        scores = ", ".join(f"{factor}: {score:.1%}" for factor, score in choice["scores"].items())
        print(f"{cell}: learning rates times {choice['factor']:g} ({scores}){hint}")
    return 0


def _cost(args: argparse.Namespace) -> int:
    import jax

    from mllm_jax.evaluation.study.cost import study_cost
    from mllm_jax.planning.topology import parse
    from mllm_jax.sweep.cells import load_recipe, read_sweep
    from mllm_jax.sweep.overrides import apply

    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU here
    try:
        machine = parse(args.topology)
    except ValueError as error:
        complain(f"mllm-jax study cost: {error}")
        return 2
    recipe = shipped.recipe(args.recipe)
    path, _, argument = recipe.partition(":")
    module, cells = load_recipe(pathlib.Path(path)), {}
    for name, overrides in read_sweep(recipe, [c for c in args.connectors.split(",") if c]).items():
        cells[name] = module.get_config(argument) if argument else module.get_config()
        apply(cells[name], overrides)
    _write(args.out, json.dumps(study_cost(args.recipe, cells, machine), indent=1))
    print(f"{args.out}: {len(cells)} cells")
    return 0


def _report(args: argparse.Namespace) -> int:
    from mllm_jax.evaluation.study.write import write_study

    print(write_study(args.sources, args.out, args.baseline))
    return 0
