"""Relaxed accuracy (Methani et al. 2020; ChartQA, Masry et al. 2022): 5 % tolerance for numbers.

The rule of pix2struct, Qwen-VL and lmms-eval: both sides parse as numbers ("%" divides by 100) and the
target is not zero: right within 5 %; otherwise equal texts, ignoring case.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.predictions import (
    Problems,
    as_text,
    by_id,
    match_ids,
    read_annotation_rows,
    read_rows,
    score_result,
    take,
)

TOLERANCE = 0.05
_ID = ("question_id", "id", "pid", "row", "index")
_TEXT = ("prediction", "text", "answer")
_TARGET = ("target", "label", "answer")


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_right(text: str, target: str) -> bool:
    """Whether an answer is right within 5 %.

    Example:
        >>> is_right("24.1", "23"), is_right("25", "23"), is_right("12%", "0.12"), is_right("Yes", "yes")
        (True, False, True, True)
    """
    said, wanted = _number(text), _number(target)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= TOLERANCE
    return text.lower() == target.lower()


def _score(name: str, predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    rows = read_rows(predictions, problems)
    gold = None
    if annotations is not None:
        gold = by_id(read_annotation_rows(annotations), _ID, annotations)
    found = match_ids(
        rows,
        gold,
        lambda r: str(take(r, _ID, str(predictions))),
        lambda r: take(r, _TEXT, str(predictions)),
        problems,
    )
    tally = Tally()
    exact = empty = no_number = 0
    for key, row in found.items():
        item = row if gold is None else gold[key]
        where = f"{annotations or predictions}: {key}"
        target = as_text(take(item, _TARGET if gold is not None else _TARGET[:2], where))
        text = as_text(take(row, _TEXT, where))
        empty += not text.strip()
        wanted = _number(target)
        no_number += bool(wanted) and math.isfinite(wanted) and _number(text) is None
        # ChartQA reports its human-written and machine-made questions apart.
        tally.add(as_text(item.get("split", item.get("type", "all"))), is_right(text, target))
        exact += text.strip().lower() == target.strip().lower()
    return score_result(
        name,
        n=tally.n,
        unparsed=empty,
        score=ratio(tally.right, tally.n),
        unit="fraction",
        subtasks=tally.accuracy(),
        groups={},
        problems=problems,
        correct=tally.right,
        exact_match=ratio(exact, tally.n),
        no_number_where_one_was_wanted=no_number,
        mean_of_splits=ratio(sum(tally.accuracy().values()), len(tally.cells)),
    )


def _benchmark(name: str, official: str) -> Benchmark:
    return Benchmark(
        name=name,
        unit="fraction",
        score_files=lambda predictions, annotations: _score(name, predictions, annotations),
        predictions="JSON lines {question_id, prediction or text}, with `target` without annotations",
        annotations="",
        official=official,
    )


BENCHMARK = _benchmark("relaxed_accuracy", "lmms-eval chartqa relaxed_correctness")
BENCHMARK_CHARTQA = _benchmark("chartqa", "lmms-eval chartqa (human and augmented splits)")
