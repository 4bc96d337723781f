"""GQA (Hudson and Manning 2019): exact match on the balanced questions.

A prediction is the text without trailing full stops, in lower case (LLaVA's `convert_gqa_for_eval.py`);
the official `eval.py` then compares it with the answer. lmms-eval's match, which also ignores
punctuation, is printed beside. Consistency, validity and plausibility are not computed: they need
answers to all questions and the scene graphs' choices.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    by_id,
    match_ids,
    read_annotations,
    read_rows,
    score_result,
    take,
)

_ID = ("questionId", "question_id", "id")
_TEXT = ("prediction", "text", "answer")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """The form that is uploaded.

    Example:
        >>> normalize("On the left..")
        'on the left'
    """
    return text.rstrip(".").lower()


def _lmms(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


def _read_gold(path: Path) -> dict[str, Any]:
    """Balanced questions of the official JSON (id -> question), or rows {question_id, answer}."""
    value = read_annotations(path)
    if as_map(value, _ID) is not None:
        gold = {str(key): item for key, item in value.items() if item.get("isBalanced", True)}
    else:
        gold = by_id(value if isinstance(value, list) else [value], _ID, path)
    if not gold:
        raise PredictionError(f"{path}: no balanced question; use testdev_balanced_questions.json")
    return dict(gold)


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = _read_gold(annotations)
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        lambda r: str(take(r, _ID, str(predictions))),
        lambda r: take(r, _TEXT, str(predictions)),
        problems,
    )
    kinds, structural, semantic = Tally(), Tally(), Tally()
    lmms = empty = 0
    for key, row in found.items():
        text, item = as_text(take(row, _TEXT, "")), gold[key]
        answer = as_text(take(item, ("answer",), f"{annotations}: {key}"))
        right = normalize(text) == answer
        empty += not text.strip()
        lmms += _lmms(text) == _lmms(answer)
        types = item.get("types") or {}
        kinds.add("binary" if types and types.get("structural") != "query" else "open", right)
        if types.get("structural"):
            structural.add(types["structural"], right)
        if types.get("semantic"):
            semantic.add(types["semantic"], right)
    return score_result(
        "gqa",
        n=kinds.n,
        unparsed=empty,
        score=100 * ratio(float(kinds.right), kinds.n),
        unit="percent",
        subtasks=structural.accuracy(100) | semantic.accuracy(100),
        groups={},
        problems=problems,
        correct=kinds.right,
        answer_kinds=kinds.accuracy(100) if structural.n else {},
        lmms_exact_match=ratio(lmms, kinds.n, 100),
    )


BENCHMARK = Benchmark(
    name="gqa",
    unit="percent",
    score_files=_score_files,
    predictions="JSON array {questionId, prediction}, or LLaVA JSON lines {question_id, text}",
    annotations="testdev_balanced_questions.json",
    official="GQA eval.py (accuracy); LLaVA convert_gqa_for_eval.py",
)
