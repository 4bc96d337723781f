"""TextVQA validation (Singh et al. 2019): soft accuracy against ten answers; two ANLS variants beside it.

Follows LLaVA's `eval_textvqa.py` with M4C's evaluator: an answer that no human gave scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
from mllm_jax.evaluation.edit_distance import anls_lmms, anls_m4c
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    by_id,
    match_ids,
    read_annotations,
    read_rows,
    score_result,
    take,
)
from mllm_jax.evaluation.vqa_normalize import m4c_normalize, soft_accuracy

_OCR = "Reference OCR token:"


def question_of(prompt: str) -> str:
    """The question in one of LLaVA's TextVQA prompts, in lower case.

    Example:
        >>> question_of("What is it?\\nReference OCR token: A, B\\nAnswer the question using a single word.")
        'what is it?'
    """
    lines = prompt.split("\n")
    if len(lines) == 3 and lines[0].startswith(_OCR):
        return lines[1].lower()
    return lines[0].lower()


def _read_gold(path: Path) -> dict[str, Mapping[str, Any]]:
    value = read_annotations(path)
    rows = value.get("data", [value]) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise PredictionError(f"{path}: expected TextVQA_0.5.1_val.json with its `data` list")
    return by_id(rows, ("question_id",), path)


def _identify(gold: Mapping[str, Mapping[str, Any]], where: Path) -> Any:
    """A function from a row to its question id: by id, else by (picture, question) as LLaVA's files need."""
    by_question = {(item["image_id"], item["question"].lower()): key for key, item in gold.items()}

    def identify(row: Mapping[str, Any]) -> str:
        key = str(take(row, ("question_id",), str(where)))
        if key in gold:
            return key
        image = row.get("image_id", row["question_id"])  # LLaVA writes the picture's id as question_id
        asked = question_of(as_text(row.get("prompt")))
        return by_question.get((image, asked), f"{image} / {asked!r}")

    return identify


def score_question(text: str, answers: Sequence[str]) -> float:
    """Soft accuracy of one answer, both sides normalised."""
    human = [m4c_normalize(as_text(a)) for a in answers]
    return soft_accuracy(m4c_normalize(text), human)


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = _read_gold(annotations)
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        _identify(gold, predictions),
        lambda r: take(r, ("text", "answer"), str(predictions)),
        problems,
    )
    scores, exact, m4c, lmms, undefined, empty = [], [], [], [], 0, 0
    for key, row in found.items():
        text = as_text(take(row, ("text", "answer"), ""))
        answers = [as_text(a) for a in take(gold[key], ("answers",), f"{annotations}: {key}")]
        empty += not text.strip()
        scores.append(score_question(text, answers))
        exact.append(m4c_normalize(text) in {m4c_normalize(a) for a in answers})
        value = anls_m4c(text, answers)
        undefined += value is None
        if value is not None:
            m4c.append(value)
        lmms.append(anls_lmms(text, answers))
    return score_result(
        "textvqa",
        n=len(scores),
        unparsed=empty,
        score=100.0 * ratio(sum(scores), len(scores)),
        unit="percent",
        subtasks={},
        groups={},
        problems=problems,
        anls={
            "m4c_STVQAANLS": ratio(sum(m4c), len(m4c)),
            "m4c_undefined_rows": undefined,
            "m4c_STVQAAccuracy": ratio(sum(exact), len(exact)),
            "lmms_eval_anls": ratio(sum(lmms), len(lmms)),
        },
    )


BENCHMARK = Benchmark(
    name="textvqa",
    unit="percent",
    score_files=_score_files,
    predictions="LLaVA JSON lines {question_id, prompt, text}",
    annotations="TextVQA_0.5.1_val.json",
    official="LLaVA eval_textvqa.py (M4C evaluator)",
)
