"""NExT-QA multiple choice (Xiao et al. 2021): causal, temporal and descriptive questions about videos.

Follows the official `eval_mc.py`: the type TP (previous / next) is counted as TN (before and after).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.option_match import match_option
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    match_ids,
    read_json,
    read_text,
    score_result,
    take,
)

GROUPS = {"Acc_C": ("CW", "CH"), "Acc_T": ("TN", "TC"), "Acc_D": ("DC", "DL", "DO")}


def _read_gold(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        raise PredictionError(f"{path}: no such file; NExT-QA's annotations are a CSV such as val.csv")
    gold = {}
    for row in csv.DictReader(io.StringIO(read_text(path, Problems()))):
        gold[f"{take(row, ('video', 'video_id'), str(path))}_{take(row, ('qid',), str(path))}"] = row
    if not gold:
        raise PredictionError(f"{path}: no rows")
    return gold


def _choice(value: Any, row: dict[str, str]) -> int | None:
    """A stored index, or free text that names one of the five options."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 <= value < 5 else None
    text = as_text(value).strip()
    if text in ("0", "1", "2", "3", "4"):
        return int(text)
    return match_option(text, [row[f"a{i}"] for i in range(5)])[0]


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = _read_gold(annotations)
    raw = read_json(predictions, problems)
    if as_map(raw, ("id", "question_id")) is not None:
        rows = [
            {"id": k, "prediction": v["prediction"] if isinstance(v, dict) else v} for k, v in raw.items()
        ]
    else:
        keys, texts = ("id", "question_id"), ("prediction", "text", "answer")
        rows = [
            {"id": str(take(r, keys, str(predictions))), "prediction": take(r, texts, str(predictions))}
            for r in (raw if isinstance(raw, list) else [raw])
            if isinstance(r, dict)
        ]
    found = match_ids(rows, gold, lambda r: r["id"], lambda r: r["prediction"], problems)
    tally, unparsed = Tally(), 0
    for key, row in found.items():
        choice = _choice(row["prediction"], gold[key])
        unparsed += choice is None
        kind = gold[key]["type"]
        tally.add("TN" if kind == "TP" else kind, choice == int(gold[key]["answer"]))
    cells = tally.counts()
    groups = {
        name: [sum(cells[k][i] for k in kinds if k in cells) for i in (0, 1)]
        for name, kinds in GROUPS.items()
    }
    return score_result(
        "nextqa",
        n=len(found),
        unparsed=unparsed,
        score=ratio(100 * tally.right, tally.n),
        unit="percent",
        subtasks={name: ratio(100 * right, n) for name, (right, n) in cells.items()},
        groups={},
        problems=problems,
        correct=tally.right,
        question_groups={name: ratio(100 * cell[0], cell[1]) for name, cell in groups.items()},
        question_group_counts=groups,
        counts=cells,
    )


BENCHMARK = Benchmark(
    name="nextqa",
    unit="percent",
    score_files=_score_files,
    predictions="JSON <video>_<qid> -> {prediction: 0-4}, or rows {id, prediction} with an index or text",
    annotations="the official CSV (val.csv, test.csv)",
    official="NExT-QA eval_mc.py",
)
