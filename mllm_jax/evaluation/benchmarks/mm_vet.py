"""MM-Vet (Yu et al. 2023): GPT-4 grades of open answers, aggregated per capability.

Scores stored grades (`mllm-jax judge mm_vet` makes them): 100 * mean grade over the questions that need
a capability, averaged over grading runs, as in the official `mm-vet_evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    match_ids,
    read_annotations,
    read_json,
    score_result,
    take,
)


def _grades(value: Any, key: str) -> list[float] | None:
    """One question's grades per run, each in [0, 1]; None if some grade is no number."""
    runs = value.get("score") if isinstance(value, dict) else value
    runs = runs if isinstance(runs, list) else [runs]
    if not runs or any(
        isinstance(g, bool) or not isinstance(g, (int, float)) or not 0 <= g <= 1 for g in runs
    ):
        return None
    return [float(g) for g in runs]


def _read_capabilities(path: Path) -> dict[str, list[str]]:
    """id -> capabilities; also from MM-Vet's own `mm-vet.json` (id -> {capability: [...]})."""
    value = read_annotations(path)
    if not isinstance(value, dict) or not value:
        raise PredictionError(f"{path}: expected a JSON object id -> capabilities")
    return {
        key: list(
            take(item, ("capability", "capabilities"), f"{path}: {key}") if isinstance(item, dict) else item
        )
        for key, item in value.items()
    }


def aggregate(grades: dict[str, Sequence[float]], capabilities: dict[str, list[str]]) -> dict[str, Any]:
    """Mean per capability, per combination of capabilities, per run and in total, as percentages."""
    runs = len(next(iter(grades.values())))
    sums: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    combos: dict[str, list[Sequence[float]]] = {}
    for key, values in grades.items():
        for name in ("total", *capabilities[key]):
            total = sums.setdefault(name, [0.0] * runs)
            counts[name] = counts.get(name, 0) + 1
            for run, grade in enumerate(values):
                total[run] += grade
        combos.setdefault("+".join(sorted(capabilities[key])), []).append(values)
    percent = {name: np.array(total) / counts[name] * 100 for name, total in sums.items()}
    return {
        "runs_total": percent["total"].tolist(),
        "std": float(percent["total"].std()),
        "mean": {name: float(values.mean()) for name, values in percent.items()},
        "per_combination": {combo: float(np.mean(rows) * 100) for combo, rows in combos.items()},
    }


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    capabilities = _read_capabilities(annotations)
    raw = read_json(predictions, problems)
    if not isinstance(raw, dict):
        raise PredictionError(f"{predictions}: expected stored grades, a JSON object id -> [grade per run]")
    if raw and all(isinstance(value, str) for value in raw.values()):
        raise PredictionError(
            f"{predictions}: these are answers; `mllm-jax judge mm_vet` makes grades of them"
        )
    rows = [{"id": key, "grades": _grades(value, key)} for key, value in raw.items()]
    found = match_ids(rows, capabilities, lambda r: r["id"], lambda r: r["grades"], problems)
    for key in [key for key, row in found.items() if row["grades"] is None]:
        problems.add("missing", f"{key}: no grade in [0, 1]")
        del found[key]
    runs = max((len(row["grades"]) for row in found.values()), default=0)
    for key in [key for key, row in found.items() if len(row["grades"]) != runs]:
        problems.add("missing", f"{key}: fewer runs than the others")
        del found[key]
    if not found:
        raise PredictionError(f"{predictions}: no grade for any question of {annotations}")
    result = aggregate({key: row["grades"] for key, row in found.items()}, capabilities)
    mean = result["mean"]
    return score_result(
        "mm_vet",
        n=len(found),
        unparsed=0,
        score=mean["total"],
        unit="percent",
        subtasks={name: value for name, value in mean.items() if name != "total"},
        groups={},
        problems=problems,
        runs=runs,
        **result,
    )


BENCHMARK = Benchmark(
    name="mm_vet",
    unit="percent",
    score_files=_score_files,
    predictions="stored grades: JSON id -> [grade per run], or the official grade file id -> {score: [...]}",
    annotations="JSON id -> capabilities, or mm-vet.json",
    official="MM-Vet mm-vet_evaluator.py",
)
