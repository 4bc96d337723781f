"""LLaVA-Bench in the wild (Liu et al. 2023): GPT-4 scores the reference and the model; 100 *
mean(model)/mean(reference).

Scores stored reviews. As in the official `summarize_gpt_review.py`, means are rounded to three decimals
first and a review without two numbers counts with (-1, -1); the figures without either are printed
beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    by_id,
    match_ids,
    read_annotation_rows,
    read_rows,
    score_result,
    take,
)

FAILED = (-1.0, -1.0)
Pair = tuple[float, float]


def parse_review(content: str) -> Pair:
    """The two scores on a review's first line, or (-1, -1).

    Example:
        >>> parse_review("8, 6.5\\nAssistant 1 ..."), parse_review("Scores: 8 7")
        ((8.0, 6.5), (-1.0, -1.0))
    """
    words = content.split("\n")[0].replace(",", " ").split()
    try:
        first, second = (float(word) for word in words)
    except ValueError:
        return FAILED
    return (first, second) if np.isfinite(first) and np.isfinite(second) else FAILED


def summarize(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Relative score with the official rounding, both means times ten, and the official printout."""
    reference, model = (round(x, 3) for x in np.asarray(pairs).mean(0).tolist())
    relative = ratio(model, reference) * 100
    return {
        "n": len(pairs),
        "relative": relative,
        "gpt4_x10": reference * 10,
        "model_x10": model * 10,
        "official_printout": [round(relative, 1), round(reference * 10, 1), round(model * 10, 1)],
    }


def _unrounded(pairs: Sequence[Pair]) -> float:
    return ratio(sum(m for _, m in pairs), sum(r for r, _ in pairs)) * 100


def _read_run(path: Path, ids: Sequence[str] | None, problems: Problems) -> dict[str, tuple[str, Pair]]:
    found = match_ids(
        read_rows(path, problems),
        ids,
        lambda r: str(take(r, ("question_id",), str(path))),
        lambda r: r.get("content"),
        problems,
    )
    run = {}
    for key, row in found.items():
        stored = row.get("tuple", row.get("score"))
        pair = parse_review(as_text(row["content"])) if row.get("content") is not None else FAILED
        if isinstance(stored, list) and len(stored) == 2:
            stored = (float(stored[0]), float(stored[1]))
            if row.get("content") is not None and stored != pair:
                problems.add("stored_scores_differ_from_the_review", key)
            pair = stored  # the official script reads the stored pair
        run[key] = (as_text(take(row, ("category",), f"{path}: {key}")), pair)
    return run


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    paths = sorted(predictions.glob("*.jsonl")) if predictions.is_dir() else [predictions]
    if not paths:
        raise PredictionError(f"{predictions}: no .jsonl review files in this folder")
    ids = None
    if annotations is not None:
        ids = list(by_id(read_annotation_rows(annotations), ("question_id",), annotations))
    runs = {path.stem: _read_run(path, ids, problems) for path in paths}
    everything = list(dict.fromkeys(key for run in runs.values() for key in run))
    for name, run in runs.items():
        for key in everything:
            if key not in run:
                problems.add("missing", f"{name}: question {key}")
    details, failed = {}, 0
    pooled: dict[str, list[float]] = {}
    for name, run in runs.items():
        parts: dict[str, list[Pair]] = {"all": []}
        for category, pair in run.values():
            parts["all"].append(pair)
            parts.setdefault(category, []).append(pair)
        details[name] = {part: summarize(pairs) for part, pairs in parts.items()}
        good = [pair for pair in parts["all"] if pair != FAILED]
        failed += len(parts["all"]) - len(good)
        details[name]["all"]["relative_without_rounding"] = _unrounded(parts["all"])
        details[name]["all"]["relative_without_unparsed"] = _unrounded(good) if good else 0.0
        for part, summary in details[name].items():
            pooled.setdefault(part, []).append(summary["relative"])
    means = {part: sum(values) / len(values) for part, values in pooled.items()}
    return score_result(
        "llava_bench",
        n=len(everything),
        unparsed=failed,
        score=means["all"],
        unit="percent",
        subtasks={part: value for part, value in means.items() if part != "all"},
        groups={},
        problems=problems,
        runs=details,
    )


BENCHMARK = Benchmark(
    name="llava_bench",
    unit="percent",
    score_files=_score_files,
    predictions="stored reviews, JSON lines {question_id, category, content}; a folder holds several runs",
    annotations="",
    official="LLaVA summarize_gpt_review.py",
)
