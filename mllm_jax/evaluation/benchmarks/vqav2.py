"""VQA v2 (Goyal et al. 2017), and OK-VQA (Marino et al. 2019), whose files have the same format.

Follows the official `vqaEval.py`. Its oddity is kept, the published numbers have it: neither side is
normalised where the ten human answers are all identical. `score_always_normalised` shows what that is
worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
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
from mllm_jax.evaluation.vqa_normalize import soft_accuracy, vqa_digits_articles, vqa_punctuation

_DECIMALS = 10  # of the official printout
_TEXT = ("answer", "text")


def normalize(text: str) -> str:
    """The server's normalisation: punctuation, then number words, articles and contractions."""
    return vqa_digits_articles(vqa_punctuation(text))


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def score_question(text: str, answers: Sequence[str]) -> float:
    """Official soft accuracy of one answer, a fraction.

    Example:
        >>> score_question("The dog.", ["dog"] * 9 + ["puppy"]), score_question("The dog.", ["dog"] * 10)
        (1.0, 0.0)
    """
    text, human = _flat(text), [_flat(answer) for answer in answers]
    if len(set(human)) > 1:
        text, human = normalize(text), [normalize(answer) for answer in human]
    return soft_accuracy(text, human)


def _percent(scores: Sequence[float]) -> float:
    return round(100 * ratio(float(sum(scores)), len(scores)), _DECIMALS)


def _read_gold(path: Path) -> dict[str, Any]:
    value = read_annotations(path)
    rows = value.get("annotations", [value]) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise PredictionError(f"{path}: expected the official annotations file with its `annotations` list")
    return by_id(rows, ("question_id",), path)


def _score(name: str, predictions: Path, annotations: Path) -> dict[str, Any]:
    problems = Problems()
    gold = _read_gold(annotations)
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        lambda r: str(take(r, ("question_id",), str(predictions))),
        lambda r: take(r, _TEXT, str(predictions)),
        problems,
    )
    scores: list[float] = []
    corrected: list[float] = []
    answer_types: dict[str, list[float]] = {}
    question_types: dict[str, list[float]] = {}
    empty = 0
    for key in gold:  # the official order of summation
        if key not in found:
            continue
        item = gold[key]
        text = as_text(take(found[key], _TEXT, ""))
        human = [
            as_text(take(a, ("answer",), f"{annotations}: {key}")) for a in take(item, ("answers",), key)
        ]
        empty += not text.strip()
        scores.append(score_question(text, human))
        corrected.append(soft_accuracy(normalize(_flat(text)), [normalize(_flat(h)) for h in human]))
        answer_types.setdefault(as_text(item.get("answer_type", "all")), []).append(scores[-1])
        question_types.setdefault(as_text(item.get("question_type", "all")), []).append(scores[-1])
    return score_result(
        name,
        n=len(scores),
        unparsed=empty,
        score=_percent(scores),
        unit="percent",
        subtasks={kind: _percent(part) for kind, part in answer_types.items()},
        groups={},
        problems=problems,
        per_question_type={kind: _percent(part) for kind, part in question_types.items()},
        score_always_normalised=_percent(corrected),
    )


def _benchmark(name: str, official: str) -> Benchmark:
    return Benchmark(
        name=name,
        unit="percent",
        score_files=lambda predictions, annotations: _score(name, predictions, annotations),
        predictions="JSON array {question_id, answer} (the upload), or LLaVA JSON lines {question_id, text}",
        annotations="the official annotations JSON (ten answers per question)",
        official=official,
    )


BENCHMARK = _benchmark("vqav2", "GT-Vision-Lab VQA vqaEval.py")
BENCHMARK_OK_VQA = _benchmark("ok_vqa", "VQA vqaEval.py on OK-VQA's annotations")
