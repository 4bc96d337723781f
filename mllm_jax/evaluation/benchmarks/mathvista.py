"""MathVista testmini (Lu et al. 2024): 1000 questions; a normalised extraction must equal the answer's text.

Follows the official `calculate_score.py` from the extraction on. Extractions are stored answers: a GPT
model makes them officially (`mllm-jax judge mathvista`); without them the rules that need no judge are
applied to the response and what is left is counted as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.edit_distance import most_similar
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    by_id,
    match_ids,
    read_annotations,
    read_json,
    score_result,
    take,
)

ITEM_KEYS = ("question_type", "answer_type")
METADATA_KEYS = ("language", "source", "category", "task", "context", "grade", "skills")
_LETTER = re.compile(r"\(([a-zA-Z])\)")


def normalize(extraction: Any, item: Mapping[str, Any], integers_by_float: bool = True) -> str | None:
    """An extraction in the form of the item's answer type, or None if it cannot be read.

    Multiple choice: a letter in parentheses or alone is that option's text; other text the most similar
    option.

    Args:
        extraction: the extracted answer.
        item: needs `question_type`, `answer_type`, `choices`, `precision`.
        integers_by_float: "3.0" is the integer 3 (today's official rule; the published 2023 table read
            only "3").

    Example:
        >>> item = {"question_type": "multi_choice", "choices": ["cat", "dog"], "answer_type": "text"}
        >>> normalize("(b) a dog", item), normalize("dogs", item)
        ('dog', 'dog')
    """
    if item["question_type"] == "multi_choice":
        text = as_text(extraction).strip()
        if named := _LETTER.findall(text):
            text = named[0].upper()
        choices = item["choices"]
        if len(text) == 1 and text in LETTERS[: len(choices)]:
            return choices[LETTERS.index(text)]
        return choices[most_similar(text, choices)]
    kind = item["answer_type"]
    try:
        if kind == "integer":
            return str(int(float(extraction)) if integers_by_float else int(extraction))
        if kind == "float":
            return str(round(float(extraction), int(item["precision"])))
    except (ValueError, TypeError, OverflowError):
        return None
    return str(extraction) if kind == "list" else as_text(extraction)


def quick_extraction(response: str, item: Mapping[str, Any]) -> str | None:
    """Where no judge is needed: empty, an option's text, a number of the wanted type; else None."""
    if response == "":
        return ""
    if item["question_type"] == "multi_choice" and response in item["choices"]:
        return response
    try:
        if item["answer_type"] == "integer":
            return str(int(response))
        if item["answer_type"] == "float":
            return str(float(response))
    except (ValueError, OverflowError):
        return None
    return None


def rows_of(value: Any) -> list[dict[str, Any]]:
    """Official result files are a JSON object pid -> item; ours are JSON lines."""
    if as_map(value, ("pid", "question_id")) is not None:
        return [{"pid": key, **row} for key, row in value.items() if isinstance(row, dict)]
    rows = value if isinstance(value, list) else [value]
    return [row for row in rows if isinstance(row, dict)]


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    rows = rows_of(read_json(predictions, problems))
    gold = None
    if annotations is not None:
        gold = by_id(rows_of(read_annotations(annotations)), ("pid", "question_id"), annotations)
    found = match_ids(
        rows,
        gold,
        lambda r: str(take(r, ("pid", "question_id"), str(predictions))),
        lambda r: r.get("extraction", r.get("response", r.get("text"))),
        problems,
    )
    overall, unparsed, old, unextracted = Tally(), 0, 0, 0
    tables = {key: Tally() for key in ITEM_KEYS + METADATA_KEYS}
    for key, row in found.items():
        item = row if gold is None else {**row, **gold[key]}
        where = f"{predictions}: {key}"
        for name in (*ITEM_KEYS, "answer"):
            take(item, (name,), where)
        if item["question_type"] == "multi_choice" and not item.get("choices"):
            raise PredictionError(f"{where}: a multiple-choice item needs its choices")
        extraction = row.get("extraction")
        if extraction is None:
            response = as_text(take(row, ("response", "text"), where)).strip()
            extraction = quick_extraction(response, item)
            if extraction is None:
                unextracted += 1
        said = None if extraction is None else normalize(extraction, item)
        unparsed += said is None
        right = said is not None and said == as_text(item["answer"])
        before = None if extraction is None else normalize(extraction, item, integers_by_float=False)
        old += before is not None and before == as_text(item["answer"])
        overall.add("average", right)
        for name, tally in tables.items():
            value = item.get(name) if name in ITEM_KEYS else (item.get("metadata") or {}).get(name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    tally.add(as_text(one), right)
    breakdown = {
        name: {
            k: {"accuracy": ratio(r, n), "correct": r, "total": n} for k, (r, n) in sorted(t.counts().items())
        }
        for name, t in tables.items()
    }
    return score_result(
        "mathvista",
        n=overall.n,
        unparsed=unparsed,
        score=ratio(overall.right, overall.n),
        unit="fraction",
        subtasks=tables["task"].accuracy(),
        groups={},
        problems=problems,
        correct=overall.right,
        without_extraction=unextracted,
        correct_with_integers_read_as_in_the_2023_table=old,
        breakdown=breakdown,
    )


BENCHMARK = Benchmark(
    name="mathvista",
    unit="fraction",
    score_files=_score_files,
    predictions="JSON lines {pid, question_type, answer_type, precision, choices, answer, extraction}",
    annotations="",
    official="MathVista calculate_score.py",
)
