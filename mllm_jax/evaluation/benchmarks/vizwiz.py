"""VizWiz VQA validation (Gurari et al. 2018): soft accuracy, both sides fully normalised (lmms-eval)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
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
from mllm_jax.evaluation.vqa_normalize import m4c_normalize, soft_accuracy

_TEXT = ("answer", "text")
UNANSWERABLE = "unanswerable"


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    items = read_annotation_rows(annotations)
    gold = by_id(items, ("image", "question_id"), annotations)
    image_of = {str(item["question_id"]): key for key, item in gold.items() if "question_id" in item}

    def identify(row: Any) -> str:
        key = str(take(row, ("image", "question_id"), str(predictions)))
        return image_of.get(key, key)

    found = match_ids(
        read_rows(predictions, problems),
        gold,
        identify,
        lambda r: take(r, _TEXT, str(predictions)),
        problems,
    )
    scores: list[float] = []
    kinds: dict[str, list[float]] = {}
    empty = said_unanswerable = 0
    for key, row in found.items():
        text = as_text(take(row, _TEXT, ""))
        answers = take(gold[key], ("answers",), f"{annotations}: {key}")
        human = [m4c_normalize(as_text(a["answer"] if isinstance(a, dict) else a)) for a in answers]
        said = m4c_normalize(text)
        empty += not text.strip()
        said_unanswerable += said == UNANSWERABLE
        scores.append(soft_accuracy(said, human))
        kinds.setdefault(as_text(gold[key].get("answer_type", "all")), []).append(scores[-1])
    return score_result(
        "vizwiz",
        n=len(scores),
        unparsed=empty,
        score=100 * ratio(sum(scores), len(scores)),
        unit="percent",
        subtasks={kind: 100 * ratio(sum(part), len(part)) for kind, part in kinds.items()},
        groups={},
        problems=problems,
        said_unanswerable=said_unanswerable,
    )


BENCHMARK = Benchmark(
    name="vizwiz",
    unit="percent",
    score_files=_score_files,
    predictions="JSON array {image, answer} (the upload), or LLaVA JSON lines {question_id, text}",
    annotations="VizWiz val.json: rows {image, answers, answer_type}, with question_id for LLaVA's files",
    official="lmms-eval vizwiz_vqa",
)
