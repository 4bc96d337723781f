"""A study's results in one small JSON file: every run's facts and curves, and the outcome of every question.

    {"format": 1, "kind": "study", "recipe": "configs/x.py:mini", "findings": [...], "left_out": {BENCHMARK: why},
     "questions": {DIGEST: [[ability, group, number of questions], ...]}, "terms": {KEY: value},
     "runs": [{"name", "variant", "seed", "overrides", "model": {...},
               "stages": {NAME: {"steps", "at": [...], "loss": [...], "grad_norm": [...], "step_seconds"}},
               "benchmarks": {NAME: {"questions": DIGEST, "model": OUTCOMES, "blind": ..., "majority": ...}}}, ...]}

OUTCOMES holds what the score counts for each question, ability by ability and in each by id: a string of hexadecimal
digits, of which each bit is a question (the highest first), or a list of numbers where a question can be half right.
DIGEST is one of the questions' ids and words, so that equal digests mean questions that can be paired. "terms" is what
all runs have in common (`terms`), "grad_norm" the connector's, where it was logged. The kind "rates" is a sweep from
which learning rates are chosen.
"""

import hashlib
import json
import math
import pathlib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mllm_jax.evaluation.report.questions import read_credits, read_questions
from mllm_jax.evaluation.report.runs import ReportError, Run, load_run
from mllm_jax.evaluation.report.shapes import NUMBER, check_shape
from mllm_jax.evaluation.study.terms import joined, terms
from mllm_jax.storage import Path, as_path, read_text
from mllm_jax.workdir import saved_config

FORMAT = 1
KINDS = ("study", "latency", "rates", "cost")  # in the order of the page
OF_RUNS = ("study", "rates")
POINTS = 40  # of a loss curve
MOST = 10**7  # questions of an ability
GRADIENT = "grad_norm/connector"
UNNAMED = "questions"  # the ability of those that have none
CONDITIONS = {"model": "predictions", "blind": "blind", "majority": "majority"}
_MODEL = ("connector", "connector_options", "visual_tokens", "image_size", "vision", "llm", "parameters")
_SHAPE = {
    "kind": str,
    "recipe": str,
    "findings": [{}],
    "questions": {...: [list]},
    "terms?": {}, "left_out?": {},
    "runs": [{
        "name": str, "variant": str, "seed": int, "overrides": {}, "order?": int,
        "model": {"connector": str, "visual_tokens": NUMBER, "image_size": NUMBER, "parameters": {...: int}},
        "stages": {...: {"steps": int}}, "benchmarks": {...: {"questions": str}},
    }],
}  # fmt: skip


def summarize(
    recipe: str,
    runs: Sequence[tuple[Mapping[str, Any], Path]],
    findings: Sequence[Mapping[str, Any]] = (),
    kind: str = "study",
) -> dict[str, Any]:
    """Collects finished runs.

    Args:
      recipe: FILE.py:ARGUMENT.
      runs: (what the sweep noted of the cell, its work directory).
      findings: what is asked of the results (`findings.Finding`), as dicts.
      kind: "study", or "rates" for a sweep from which learning rates are chosen.

    Raises:
      ReportError: a run that cannot be read, or that cannot be compared with those before it.
      ConfigError: a run's configuration cannot be read.
    """
    found: dict[str, Any] = {
        "format": FORMAT, "kind": kind, "recipe": recipe, "findings": list(findings), "questions": {},
        "left_out": {}, "terms": {}, "runs": [],
    }  # fmt: skip
    for note, directory in runs:
        own = terms(saved_config(directory), note["overrides"], note["name"])
        found["terms"] = joined(found["terms"], own, "others before it", note["name"])
        run, benchmarks = load_run(directory, note["name"]), {}
        for name in run.benchmarks:
            try:
                benchmarks[name] = _outcomes(run, name, found["questions"])
            except NoOutcomes as error:
                found["left_out"][name] = str(error)
        facts = {key: run.model[key] for key in _MODEL if key in run.model}
        stages = {name: _stage(records) for name, records in run.metrics.items()}
        found["runs"].append({**note, "model": facts, "stages": stages, "benchmarks": benchmarks})
    return found


def merge(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One summary of several: of sweeps of one recipe in several folders, or of one whose folder is gone.

    Args:
      summaries: where each is from -> what `summarize` gave.

    Returns:
      All runs, those of one cell together; the rest is the last one's.

    Raises:
      ReportError: one holds no runs, they are of different recipes, a run is in two of them with different results, a
        cell is not set alike in all or its runs had other models or stages, or their terms differ.
    """
    for source, summary in summaries.items():
        if summary["kind"] not in OF_RUNS:
            raise ReportError(
                f"{source} holds no runs ({summary['kind']}), so there is nothing to collect in it"
            )
    *_, last = summaries.values()
    findings = [summary["findings"] for summary in summaries.values() if summary["findings"]]
    found = {
        **last,
        "questions": {},
        "left_out": {},
        "terms": {},
        "findings": findings[-1] if findings else [],
    }
    first = next(iter(summaries))
    runs: dict[str, tuple[str, dict[str, Any]]] = {}  # name -> where it is from, the run
    cells: dict[str, tuple[str, dict[str, Any]]] = {}
    for source, summary in summaries.items():
        if (summary["kind"], recipe_name(summary)) != (last["kind"], recipe_name(last)):
            raise ReportError(
                f"{source} is of {summary['recipe']} ({summary['kind']}), not of {last['recipe']} ({last['kind']}) as "
                "the last one given; a summary is of one recipe"
            )
        found["terms"] = joined(found["terms"], summary.get("terms", {}), first, source)
        found["questions"] |= summary["questions"]
        found["left_out"] |= summary.get("left_out", {})
        for run in summary["runs"]:
            other, held = runs.setdefault(run["name"], (source, run))
            if held["benchmarks"] != run["benchmarks"]:
                raise ReportError(
                    f"{run['name']} has other results in {other} than in {source}; give only one of them"
                )
            other, held = cells.setdefault(run["variant"], (source, run))
            if held["overrides"] != run["overrides"]:
                raise ReportError(
                    f"the cell {run['variant']} is set otherwise in {other} than in {source} (a learning rate that "
                    "was chosen later?), so its runs cannot be compared"
                )
            if _trained(held) != _trained(run):
                raise ReportError(
                    f"runs of the cell {run['variant']} have other models or numbers of steps in {other} than in "
                    f"{source} ({_trained(held)} and {_trained(run)}), so they cannot be compared"
                )
    place = {variant: run.get("order") or 0 for variant, (_, run) in cells.items()}
    found["runs"] = sorted(
        (run for _, run in runs.values()),
        key=lambda run: (place[run["variant"]], run["variant"], run["seed"]),
    )
    return found


def _trained(run: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a cell have alike."""
    return {**run["model"], **{f"steps of {name}": stage["steps"] for name, stage in run["stages"].items()}}


def recipe_name(summary: Mapping[str, Any]) -> str:
    """What results of one recipe have in common wherever its file lies: "x.py:mini" of "configs/x.py:mini"."""
    return pathlib.PurePath(summary["recipe"]).name


class NoOutcomes(ValueError):
    """A benchmark of which no single question has a score; the message says why."""


def _outcomes(run: Run, benchmark: str, questions: dict[str, Any]) -> dict[str, Any]:
    asked, groups = read_questions(run, benchmark), run.benchmarks[benchmark]["groups"]
    ability_of = {key: question.ability or UNNAMED for key, question in asked.items()}
    abilities = [*groups, *sorted(set(ability_of.values()) - set(groups))]
    order = sorted(asked, key=lambda key: (abilities.index(ability_of[key]), str(key)))
    text = json.dumps([[str(key), asked[key].asked] for key in order])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    found: dict[str, Any] = {"questions": digest}
    for condition, file in CONDITIONS.items():
        try:
            credits = read_credits(run, benchmark, file)
        except ValueError as error:
            if condition == "model":
                raise NoOutcomes(str(error)) from error
            continue
        if missing := [key for key in order if key not in credits]:
            raise ReportError(
                f"{run.directory}: {benchmark}: question {missing[0]!r} has no {condition} answer"
            )
        found[condition] = packed([credits[key] for key in order])
    counts = Counter(ability_of.values())
    questions[digest] = [[name, groups.get(name, ""), counts[name]] for name in abilities if counts[name]]
    return found


def packed(credits: Sequence[int | float]) -> str | list[float]:
    """Outcomes as they are kept.

    Example:
      >>> packed([1, 0, 0, 1, 1]), packed([0.5, 1])
      ('98', [0.5, 1.0])
    """
    if set(credits) <= {0, 1}:
        return np.packbits(np.asarray(credits, bool)).tobytes().hex()
    return [round(float(credit), 4) for credit in credits]


def unpacked(outcomes: str | Sequence[int | float], count: int) -> Float[np.ndarray, " Q"]:
    """What `packed` was given.

    Raises:
      ValueError: they are not `count` outcomes.
    """
    if isinstance(outcomes, str):
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(outcomes), np.uint8))
        if bits.size != -(-count // 8) * 8:
            raise ValueError(f"{bits.size} bits for {count} questions")
        return bits[:count].astype(np.float64)
    if len(outcomes) != count:
        raise ValueError(f"{len(outcomes)} outcomes for {count} questions")
    return np.asarray(outcomes, np.float64)


def _stage(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    chosen = [
        records[index] for index in np.unique(np.linspace(0, len(records) - 1, POINTS).round().astype(int))
    ]
    seconds = [record["step_seconds"] for record in records if "step_seconds" in record]
    found = {"steps": records[-1]["step"], "at": [record["step"] for record in chosen]}
    found["loss"] = [round(record["loss"], 4) for record in chosen]
    if all(GRADIENT in record for record in chosen):
        found["grad_norm"] = [float(f"{record[GRADIENT]:.3g}") for record in chosen]
    if seconds:
        found["step_seconds"] = round(statistics.median(seconds), 6)
    return found


def _check_numbers(summary: Mapping[str, Any]) -> None:
    """Numbers of questions and times, which would do harm far from here.

    Raises:
      ValueError: they are none.
    """
    for layout in summary["questions"].values():
        for entry in layout:
            if not (len(entry) == 3 and isinstance(entry[2], int) and 0 < entry[2] <= MOST):
                raise ValueError(f"questions {entry!r:.60} are not [ability, group, number]")
    for run in summary["runs"]:
        for name, stage in run["stages"].items():
            _check_seconds(stage.get("step_seconds", 1), f"step_seconds of {run['name']}, {name}")


def _check_seconds(value: Any, what: str) -> None:
    check_shape(value, NUMBER, what)
    if not 0 < value < math.inf:
        raise ValueError(f"{what} is {value!r}")


def read_summary(path: str | Path) -> dict[str, Any]:
    """A file that holds what `summarize` gives, or another of a study's kinds of results.

    Raises:
      ReportError: it does not.
    """
    try:
        value = json.loads(read_text(as_path(path)))
        check_shape(value, {"kind": str, "format": int}, str(path))
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']} is not the one of this version, {FORMAT}")
        if value["kind"] not in KINDS:
            raise ValueError(f"kind {value['kind']!r} is none of {', '.join(KINDS)}")
        if value["kind"] in OF_RUNS:
            check_shape(value, _SHAPE, str(path))
            _check_numbers(value)
        elif value["kind"] == "latency":
            check_shape(value, {"recipe": str, "cells": {...: {...: NUMBER}}, "device": str}, str(path))
            for name, times in value["cells"].items():
                for key, seconds in times.items():
                    _check_seconds(seconds, f"{key} of {name}")
        else:
            check_shape(value, {"recipe": str, "cells": {...: {}}}, str(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(
            f"{path} is no summary of a study ({error}); make it with `mllm-jax study collect`"
        ) from None
    return value
