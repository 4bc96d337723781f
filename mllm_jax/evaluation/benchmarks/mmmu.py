"""MMMU validation (Yue et al. 2024): 900 college questions, 30 subjects in 6 domains, accuracy over all
questions.

Unreadable multiple-choice answers get the official random choice (seed 42, one draw per answer in the
order of the annotations); the draws are counted and the accuracy without them is printed beside the
headline.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.benchmarks.mmmu_parse import Fallback, find_choice, open_is_right, parse_open
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

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_ID = re.compile(r"(?:validation|test|dev)_(.+)_\d+")
_LETTER = re.compile(r"[A-Z]")
_TEXT = ("response", "text", "answer_text", "prediction", "answer")


def _read_rows(path: Path, problems: Problems) -> list[dict[str, Any]]:
    """Rows {id, text, raw}: a JSON object id -> final answer is not raw, rows with responses are."""
    value = read_json(path, problems)
    if as_map(value, ("id", "question_id")) is not None:
        return [{"id": str(key), "text": as_text(text), "raw": False} for key, text in value.items()]
    rows = []
    for row in value if isinstance(value, list) else [value]:
        if isinstance(row, dict):
            text = as_text(take(row, _TEXT, str(path)))
            rows.append(
                {**row, "id": str(take(row, ("id", "question_id"), str(path))), "text": text, "raw": True}
            )
        else:
            problems.add("unreadable_line", f"{path.name}: not a JSON object: {row!r:.60}")
    return rows


def _options(row: dict[str, Any], item: Any, where: str) -> dict[str, str]:
    """Letter -> option text, from the prediction row or the annotation."""
    for source in (row, item):
        if source.get("index2ans"):
            return {letter: as_text(text) for letter, text in source["index2ans"].items()}
        if source.get("options"):
            return dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", map(as_text, source["options"]), strict=False))
    raise PredictionError(f"{where}: raw responses need `options` or `index2ans`, here or in the annotations")


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    raw_gold = read_annotations(annotations)
    gold = as_map(raw_gold, ("id", "question_id"))
    if gold is None:
        rows = raw_gold if isinstance(raw_gold, list) else [raw_gold]
        gold = dict(by_id(rows, ("id", "question_id"), annotations))
    found = match_ids(
        _read_rows(predictions, problems), gold, lambda r: r["id"], lambda r: r["text"], problems
    )
    tally, fallback = Tally(), Fallback()
    unparsed = right_without = 0
    for key in gold:
        if key not in found:
            continue
        name = _ID.fullmatch(key)
        if name is None:
            raise PredictionError(f"{annotations}: id {key!r} is not <split>_<subject>_<number>")
        row, item = found[key], gold[key]
        answer = take(item, ("ground_truth", "answer"), f"{annotations}: {key}")
        drawn = False
        if item.get("question_type", "multiple-choice") != "multiple-choice":
            right = open_is_right(parse_open(row["text"]), answer)
        elif row["raw"]:
            options = _options(row, item, f"{predictions}: {key}")
            choice = find_choice(row["text"], list(options), options)
            drawn = choice is None
            right = (fallback.draw(key, list(options)) if drawn else choice) == answer
        else:
            unparsed += not _LETTER.fullmatch(row["text"])
            right = row["text"] in ([answer] if isinstance(answer, str) else answer)
        tally.add(name[1], right)
        right_without += right and not drawn
    cells = tally.counts()
    domains = {
        domain: [sum(cells[s][i] for s in subjects if s in cells) for i in (0, 1)]
        for domain, subjects in DOMAINS.items()
    }
    return score_result(
        "mmmu",
        n=tally.n,
        unparsed=unparsed + len(fallback.drawn),
        score=ratio(tally.right, tally.n),
        unit="fraction",
        subtasks=tally.accuracy(),
        groups={},
        problems=problems,
        correct=tally.right,
        domains={domain: ratio(*cell) for domain, cell in domains.items()},
        domain_counts=domains,
        random_fallbacks=len(fallback.drawn),
        fallback_ids=fallback.drawn,
        correct_not_counting_fallback=right_without,
        score_not_counting_fallback=ratio(right_without, tally.n),
    )


BENCHMARK = Benchmark(
    name="mmmu",
    unit="fraction",
    score_files=_score_files,
    predictions="JSON id -> final answer, or rows {id, response, all_choices, index2ans} with raw responses",
    annotations="answer_dict_val.json: id -> {question_type, ground_truth}",
    official="MMMU main_eval_only.py and main_parse_and_eval.py",
)
