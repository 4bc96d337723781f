"""BLINK (Fu et al. 2024): 14 visual perception tasks; the total is the mean of the task accuracies.

The answer files hold final letters in parentheses; an answer is right if it is exactly the annotated one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    match_ids,
    read_annotations,
    read_json,
    score_result,
)

_ID = re.compile(r"(?:val|test)_(.+)_\d+")
_FINAL = re.compile(r"\([A-D]\)")
# The order of the official table; the total's last digit depends on the order of summation.
TASKS = (
    "Visual_Similarity",
    "Counting",
    "Relative_Depth",
    "Jigsaw",
    "Art_Style",
    "Functional_Correspondence",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Object_Localization",
    "Visual_Correspondence",
    "Multi-view_Reasoning",
    "Relative_Reflectance",
    "Forensic_Detection",
    "IQ_Test",
)


def _pairs(value: Any, path: Path) -> list[dict[str, str]]:
    if as_map(value, ("id",)) is not None:
        return [{"id": key, "answer": answer} for key, answer in value.items()]
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list) and all(isinstance(row, dict) and "id" in row for row in value):
        return [
            {"id": str(r["id"]), "answer": r.get("answer", r.get("prediction", r.get("text")))} for r in value
        ]
    raise PredictionError(f"{path}: expected a JSON object id -> '(A)', or rows {{id, answer}}")


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = {row["id"]: row["answer"] for row in _pairs(read_annotations(annotations), annotations)}
    rows = _pairs(read_json(predictions, problems), predictions)
    found = match_ids(rows, gold, lambda r: r["id"], lambda r: r["answer"], problems)
    tally, unparsed = Tally(), 0
    for key, row in found.items():
        name = _ID.fullmatch(key)
        if name is None:
            raise PredictionError(f"{annotations}: id {key!r} has no task name in it (val_<task>_<number>)")
        answer = as_text(row["answer"])
        unparsed += not _FINAL.fullmatch(answer)
        tally.add(name[1], answer == gold[key])
    tasks = tally.accuracy()
    order = [t for t in TASKS if t in tasks] + [t for t in tasks if t not in TASKS]
    return score_result(
        "blink",
        n=len(found),
        unparsed=unparsed,
        score=ratio(sum(tasks[t] for t in order), len(order)),
        unit="fraction",
        subtasks={t: tasks[t] for t in order},
        groups={},
        problems=problems,
        micro_accuracy=ratio(tally.right, tally.n),
        counts=tally.counts(),
    )


BENCHMARK = Benchmark(
    name="blink",
    unit="fraction",
    score_files=_score_files,
    predictions='JSON object id -> "(A)", or rows {id, answer}',
    annotations='val_answers.json: id -> "(A)"',
    official="BLINK eval/evaluate.py",
)
