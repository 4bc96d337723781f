"""ScienceQA (Lu et al. 2022): one letter; the full test set and its part with pictures (IMG).

Rule of LLaVA's `eval_science_qa.py`: a bare letter A-E; or a letter followed by ". "; or exactly one match of
"The answer is X." with any character in the place of the full stop (upstream does not escape it).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
from mllm_jax.evaluation.predictions import (
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

LETTERS = "ABCDE"
_ANSWER = re.compile(r"The answer is ([A-Z]).")


def parse_letter(text: str) -> str | None:
    """The letter that an answer names, or None.

    Example:
        >>> [parse_letter(t) for t in ("B", "C. blue", "So: The answer is D.", "b", "A or B")]
        ['B', 'C', 'D', None, None]
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _ANSWER.findall(text)
    return found[0] if len(found) == 1 else None


def right_lmms(text: str, answer: str) -> bool:
    """lmms-eval's rule: the text is the letter, or starts with the letter and a full stop."""
    text = text.strip()
    return text == answer or (len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0] == answer)


def _read_gold(path: Path) -> dict[str, dict[str, Any]]:
    """id -> answer, number of choices, has_image; from the short form or ScienceQA's `problems.json`."""
    raw = read_annotations(path)
    if as_map(raw, ("question_id", "id")) is None:
        raw = by_id(raw if isinstance(raw, list) else [raw], ("question_id", "id"), path)
    gold = {}
    for key, row in raw.items():
        answer = take(row, ("answer",), f"{path}: {key}")
        choices = row["n_choices"] if "n_choices" in row else len(take(row, ("choices",), f"{path}: {key}"))
        image = row["has_image"] if "has_image" in row else bool(row.get("image"))
        if row.get("split", "test") == "test":
            letter = answer if isinstance(answer, str) else LETTERS[answer]
            gold[str(key)] = {"answer": letter, "n": choices, "image": image, "subject": row.get("subject")}
    return gold


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = _read_gold(annotations)
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        lambda r: str(take(r, ("question_id", "id"), str(predictions))),
        lambda r: take(r, ("text", "answer"), str(predictions)),
        problems,
    )
    parts = {"IMG": [0, 0], "TXT": [0, 0]}
    unparsed = no_choice = lmms = 0
    for key, row in found.items():
        text, item = as_text(take(row, ("text", "answer"), "")), gold[key]
        letter = parse_letter(text)
        unparsed += letter is None
        offered = letter is not None and letter in LETTERS[: item["n"]]
        no_choice += not offered
        cell = parts["IMG" if item["image"] else "TXT"]
        cell[0] += offered and letter == item["answer"]
        cell[1] += 1
        lmms += right_lmms(text, item["answer"])
    right = parts["IMG"][0] + parts["TXT"][0]
    return score_result(
        "scienceqa",
        n=len(found),
        unparsed=unparsed,
        score=ratio(right, len(found), 100),
        unit="percent",
        subtasks={name: ratio(*cell, 100) for name, cell in parts.items() if cell[1]},
        groups={},
        problems=problems,
        correct=right,
        accuracy=ratio(right, len(found), 100),
        img_total=parts["IMG"][1],
        img_correct=parts["IMG"][0],
        img_accuracy=ratio(*parts["IMG"], 100),
        letter_not_among_the_choices=no_choice - unparsed,
        pred_idx_minus1=no_choice,
        lmms_accuracy=ratio(lmms, len(found), 100),
    )


BENCHMARK = Benchmark(
    name="scienceqa",
    unit="percent",
    score_files=_score_files,
    predictions="LLaVA JSON lines {question_id, text}",
    annotations="JSON id -> {answer, n_choices, has_image}, or ScienceQA's problems.json",
    official="LLaVA eval_science_qa.py",
)
