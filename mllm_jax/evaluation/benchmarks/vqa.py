"""Short answers with one reference each: exact match after normalisation, with the majority baseline.

The generic benchmark for a user's own data (`easy_vqa`, `nlvr`, ...).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.benchmarks.mini import same_answer
from mllm_jax.evaluation.predictions import Problems, as_text, match_ids, read_rows, score_result, take


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = {}
    for row in read_rows(annotations, problems):
        key = take(row, ("question_id", "id"), str(annotations))
        if key in gold:
            raise ValueError(f"{annotations}: question id {key!r} occurs twice")
        gold[key] = row
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        lambda r: take(r, ("question_id", "id"), str(predictions)),
        lambda r: take(r, ("text", "answer", "prediction"), str(predictions)),
        problems,
    )
    answers = {key: as_text(take(row, ("answer", "label"), str(annotations))) for key, row in gold.items()}
    kinds: dict[str, list[int]] = {}
    group_of: dict[str, str] = {}
    right = unparsed = 0
    for key, row in found.items():
        text = as_text(take(row, ("text", "answer", "prediction"), str(predictions)))
        ok = bool(text.strip()) and same_answer(text, answers[key])
        unparsed += not text.strip()
        right += ok
        kind = as_text(gold[key].get("question_type") or gold[key].get("ability") or "all")
        if gold[key].get("group"):
            group_of[kind] = as_text(gold[key]["group"])
        cell = kinds.setdefault(kind, [0, 0])
        cell[0] += ok
        cell[1] += 1
    members: dict[str, list[float]] = {}
    for kind, (r, n) in kinds.items():
        if kind in group_of:
            members.setdefault(group_of[kind], []).append(r / n)
    majority, count = Counter(answers.values()).most_common(1)[0]
    return score_result(
        "vqa",
        n=len(found),
        unparsed=unparsed,
        score=right / len(found) if found else 0.0,
        unit="fraction",
        subtasks={kind: r / n for kind, (r, n) in kinds.items()},
        groups={group: sum(scores) / len(scores) for group, scores in members.items()},
        problems=problems,
        counts=kinds,
        correct=right,
        majority_answer=majority,
        majority_baseline=count / len(answers),
        different_answers=len(set(answers.values())),
    )


BENCHMARK = Benchmark(
    name="vqa",
    unit="fraction",
    score_files=_score_files,
    predictions="JSON lines {question_id, text}",
    annotations="JSON lines or array {question_id, answer}, optionally question_type or ability, group",
    official="this project; exact match after VQA normalisation",
)
