"""Read a data set before training, or questions before an evaluation, and report every problem in it.

    mllm-jax validate --json data.json --images images/
    mllm-jax validate --json questions.json --images images/
    mllm-jax validate --json data.json --images images/ --template vicuna_v1 \\
        --tokenizer path/to/tokenizer --seq-len 2048 --tokens-per-image 576 --plot tokens.png
    mllm-jax validate --json data.json --images images/ --config llava_next:mini --plot tokens.png

With a tokenizer, or a recipe that names one, all tokens are counted as training will count them: what is longer than a
row, how full rows would be, how much is supervised.

The exit code is 0 if nothing is wrong, 1 if there is a problem, 2 if the command itself cannot be carried out.
"""

import argparse
import ast
import math
import os
import runpy
import time
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from mllm_jax import files
from mllm_jax.cli import shipped
from mllm_jax.config import SCHEMA, check_key
from mllm_jax.console import complain, make_console, print_table, progress_bar, say
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.images import MAX_PIXELS
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.reading import DataError, read_json_rows
from mllm_jax.data.sample_keys import benchmark_for
from mllm_jax.data.validate import Layout, Report, validate
from mllm_jax.data.video_layout import POOLS, Video, WithVideo
from mllm_jax.schema import check_tree
from mllm_jax.storage import as_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax validate`."""
    parser.add_argument(
        "--json", required=True, metavar="FILE", help="LLaVA-format .json or .jsonl file, or questions"
    )
    parser.add_argument("--images", metavar="DIR", help="the image folder (leave out for text-only data)")
    parser.add_argument("--template", help="also check that every conversation fits this template")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="also check lengths with this tokenizer; mini: the shipped one"
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="row length in tokens, visual tokens included"
    )
    parser.add_argument("--tokens-per-image", type=int, metavar="M", help="visual tokens of one image")
    parser.add_argument("--image-slots", type=int, metavar="I", help="images a row has room for")
    parser.add_argument(
        "--video-frames",
        type=int,
        metavar="N",
        help="as model.video.frames: frames that are picked of a video",
    )
    parser.add_argument(
        "--video-pool",
        choices=POOLS,
        help="as model.video.pool (default: max1d; 2d takes tokens for a square)",
    )
    parser.add_argument("--label-tokens", type=int, metavar="L", help="supervised tokens a row may hold")
    parser.add_argument(
        "--config", metavar="RECIPE", help="take all of these from a recipe: FILE.py, or a shipped one's NAME"
    )
    parser.add_argument("--stage", metavar="NAME", help="of the recipe (default: its last)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the recipe, as --config.KEY=VALUE of train",
    )
    parser.add_argument(
        "--plot", metavar="PNG", help="draw histograms of tokens, supervised tokens and images"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that count tokens"
    )
    parser.add_argument(
        "--duplicate-ids",
        choices=("error", "number"),
        default="error",
        help="report repeated ids, or number them",
    )
    parser.add_argument("--compat", choices=("llava",), help="accept what LLaVA's own loader accepts")
    parser.add_argument("--max-image-pixels", type=int, default=MAX_PIXELS, metavar="P")
    parser.add_argument("--threads", type=int, help="for decoding; default: one per core, up to 16")
    parser.add_argument("--show", type=int, default=5, metavar="K", help="offenders to show of each kind")
    parser.add_argument("--json-report", metavar="FILE", help="write everything found to this file")


def run(args: argparse.Namespace) -> int:
    """Validates; returns 1 if there is any problem, 2 for a missing path or options that do not go together."""
    console = make_console()
    try:
        settings = _of_recipe(args) if args.config else _of_options(args)
        layout = settings["layout"]
        if args.plot and layout.tokenizer is None:
            raise ValueError("--plot needs --tokenizer or --config: it shows numbers of tokens")
    except (ValueError, OSError) as error:
        complain(f"mllm-jax validate: {error}")
        return 2
    for option, path in (("--json", args.json), ("--images", args.images)):
        if path is not None and not os.path.exists(path):
            complain(f"mllm-jax validate: {option} {path}: no such file or folder")
            return 2
    started = time.perf_counter()
    if asked := _benchmark(args.json):
        return _validate_questions(asked, args, console)
    with progress_bar(console, transient=True) as bar:
        tasks = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"checking {stage}", total=total)
            bar.update(tasks[stage], completed=done)

        report = validate(
            args.json,
            args.images,
            **settings,
            duplicate_ids=args.duplicate_ids,
            num_threads=args.threads,
            workers=max(1, args.workers),
            progress=progress,
        )
    _show(report, console, args.show, time.perf_counter() - started)
    if layout.tokenizer is None:
        say(console, "Lengths were not checked; give --tokenizer to do so.")
    if args.plot and len(report.counts):
        from mllm_jax.evaluation.report.counts_plot import plot_counts  # imports matplotlib

        plot_counts(report.counts, layout.seq_len, as_path(args.plot))
        say(console, f"Histograms are in {args.plot}")
    if args.json_report:
        _write_report(args.json_report, report, console)
    return 1 if report.problems else 0


def _benchmark(path: str) -> str | None:
    """The benchmark that a file holds the questions of, if it does not hold training data."""
    try:
        return benchmark_for(read_json_rows(path))
    except DataError:
        return None


def _validate_questions(benchmark: str, args: argparse.Namespace, console: Console) -> int:
    from mllm_jax.evaluation.check_questions import check_questions  # a slow import

    started = time.perf_counter()
    report = check_questions(
        benchmark,
        args.json,
        args.images,
        compat=args.compat,
        max_image_pixels=args.max_image_pixels,
        num_threads=args.threads,
    )
    say(console, f"Questions for the benchmark {benchmark!r} (eval.benchmarks.NAME.kind, or --benchmark):")
    _show(report, console, args.show, time.perf_counter() - started)
    if args.json_report:
        _write_report(args.json_report, report, console)
    return 1 if report.problems else 0


def _write_report(path: str, report: Report, console: Console) -> None:
    files.write_json(path, report.to_json(), ensure_ascii=True)  # ids may hold halves of characters
    say(console, f"Everything found is in {path}")


def _layout(args: argparse.Namespace) -> Layout:
    lengths = {
        "--template": args.template,
        "--seq-len": args.seq_len,
        "--tokens-per-image": args.tokens_per_image,
    }
    missing = [option for option, value in lengths.items() if value is None]
    if args.tokenizer is not None and missing:
        raise ValueError(f"--tokenizer needs {' and '.join(missing)} too")
    if args.tokenizer is None and (args.seq_len, args.tokens_per_image, args.label_tokens) != (None,) * 3:
        raise ValueError("--seq-len, --tokens-per-image and --label-tokens need --tokenizer too")
    if args.video_frames is None and args.video_pool is not None:
        raise ValueError("--video-pool needs --video-frames too")
    if args.template is None and args.image_slots is not None:
        raise ValueError("--image-slots needs --template too")
    tokenizer = None
    if args.tokenizer is not None:
        from transformers import AutoTokenizer  # takes seconds to import

        from mllm_jax.interop.hub import MINI, resolve_path

        # of a checkpoint on the hub, only the tokenizer is fetched
        where = resolve_path(MINI) if args.tokenizer == MINI else args.tokenizer
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    template = None if args.template is None else resolve_template(args.template, tokenizer)
    rule = None
    if args.tokens_per_image is not None:
        rule = WholeImage(Slot(args.tokens_per_image))
        if args.video_frames is not None:
            side = math.isqrt(args.tokens_per_image)
            grid = (side, side) if side**2 == args.tokens_per_image else None
            rule = WithVideo(rule, _video(args), grid)
    return Layout(template, tokenizer, args.seq_len, rule, args.image_slots, args.label_tokens)


_IN_RECIPE = (
    "template",
    "tokenizer",
    "seq_len",
    "tokens_per_image",
    "image_slots",
    "label_tokens",
    "video_frames",
    "video_pool",
)


def _of_options(args: argparse.Namespace) -> dict[str, Any]:
    """What options say of how samples are laid out and images read, as arguments of `validate`."""
    limit = {"compat": args.compat, "max_image_pixels": args.max_image_pixels}
    return {"layout": _layout(args), "video": _video(args), **limit}


def _of_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """What a recipe's stage says of this.

    Raises:
      ValueError: no such recipe, stage or key, or an option that the recipe decides.
    """
    # imports JAX
    from mllm_jax.inference.runs import model_config, video_settings
    from mllm_jax.interop import load_tokenizer

    given = [f"--{name.replace('_', '-')}" for name in _IN_RECIPE if getattr(args, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: the recipe decides this; change it with --set")
    config = load_config(args.config, args.set)
    check_tree(config, SCHEMA)  # not its sources: the data are given
    name = args.stage or config.stage_order[-1]
    if name not in config.stages:
        raise ValueError(f"--stage {name}: the recipe has {', '.join(config.stage_order)}")
    stage, data = config.stages[name], config.data
    tokenizer = load_tokenizer(config.model.llm.path)
    layout = Layout(
        resolve_template(stage.template, tokenizer),
        tokenizer,
        stage.seq_len or data.seq_len,
        model_config(config).visual_layout,
        stage.image_slots or data.image_slots,
        data.label_tokens,
        stage.samples_per_row if stage.samples_per_row > 1 else Layout.samples_per_row,
    )
    limit = {"compat": data.compat or None, "max_image_pixels": data.max_image_pixels}
    return {"layout": layout, "video": video_settings(config) or Video(), **limit}


def load_config(recipe: str, changes: Sequence[str]) -> ConfigDict:
    """The configuration of a recipe, with keys changed.

    Args:
      recipe: FILE.py, FILE.py:ARGUMENT or the name of a shipped one.
      changes: KEY=VALUE.

    Raises:
      ValueError: no such recipe or key.
    """
    path, _, argument = shipped.recipe(recipe).partition(":")
    if not os.path.isfile(path):
        raise ValueError(f"--config: there is no recipe {path}; shipped ones: {', '.join(shipped.names())}")
    get_config = runpy.run_path(path)["get_config"]
    config = get_config(argument) if argument else get_config()
    for change in changes:
        key, _, text = change.partition("=")
        check_key(config, key)
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, KeyError) as error:
            raise ValueError(f"--set {change}: {error}") from None
    return config


def _video(args: argparse.Namespace) -> Video:
    given = {"frames": args.video_frames, "pool": args.video_pool}
    return Video(**{key: value for key, value in given.items() if value is not None})


def _show_tokens(stats: dict[str, Any], console: Console) -> None:
    rows, total = stats["rows"], stats["tokens_total"]
    groups = rows["by_images"]
    counted = sum(group["samples"] for group in groups)

    def share(part: int, whole: int) -> str:
        return f"{part / max(whole, 1):.1%}"

    say(
        console,
        f"  learned tokens: {stats['learned_tokens']:,} of {total:,} ({share(stats['learned_tokens'], total)}); "
        f"visual tokens: {stats['visual_tokens']:,}",
    )
    alone, packed = (f"{rows[f'useful_{how}']:.1%}" for how in ("alone", "packed"))
    say(
        console,
        f"  rows of {rows['row_length']:,}: {rows['over_row']:,} of {counted:,} samples "
        f"({rows['over_row'] / counted:.2%}) do not fit; of the rest, {alone} of the rows' positions are used with one "
        f"sample a row, {packed} with packing ({rows['rows_packed']:,} rows)",
    )
    table = [
        (
            str(group["images"]),
            f"{group['samples']:,}",
            share(group["samples"], counted),
            f"{group['tokens'] / group['samples']:,.0f}",
            f"{group['visual_tokens'] / group['samples']:,.0f}",
            f"{group['supervised_tokens'] / group['samples']:,.0f}",
        )
        for group in groups
    ]
    head = ("images", "samples", "share", "tokens each", "visual", "supervised")
    print_table(console, head, table, "by number of images")


def _show(report: Report, console: Console, show: int, seconds: float) -> None:
    stats = report.stats
    say(
        console,
        f"{report.path}: {report.samples} samples, {stats['answers']} answers, "
        f"{stats['images']} images, "
        + (f"{stats['videos']} videos, " if "videos" in stats else "")
        + f"{stats['text_only']} text-only samples, "
        f"{stats['several_images']} with several images; read in {seconds:.1f} s",
    )
    for key, unit in (("widths", "pixels"), ("heights", "pixels"), ("tokens", "per sample")):
        if key in stats:
            low, middle, high = stats[key]
            say(console, f"  {key}: {low} to {high} {unit}, median {middle}")
    if "rows" in stats:
        _show_tokens(stats, console)
    if not report.problems:
        say(console, "No problems found.", "bold green")
        return
    for kind, problems in report.by_kind().items():
        rows = [(problem.sample or "(whole file)", problem.message) for problem in problems[:show]]
        if len(problems) > show:
            rows.append(("...", f"and {len(problems) - show} more"))
        print_table(console, ("sample", "problem"), rows, f"{kind}: {len(problems)}", text_columns=2)
    affected = f"{report.samples - report.sound} of {report.samples} samples affected"
    count = len(report.problems)
    say(console, f"{count} problem{'s' * (count != 1)}; {affected}.", "bold red")
    if report.broken:
        say(
            console,
            f"Training with --config.data.broken=skip leaves {report.broken} samples out, and lists them.",
        )
