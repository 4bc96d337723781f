"""Q-Bench A1 (Wu et al. 2024), English and Chinese: multiple choice on low-level vision.

Answer files are items with a `response`, JSON objects written one after another. The answer is the
letter or the option's text (`match_option`). The paper matches free text with a GPT model instead; with
letters as answers both agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.option_match import LETTERS, match_option
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    match_ids,
    read_annotation_rows,
    read_rows,
    score_result,
    take,
)

_TEXT = ("response", "text")


def _key(row: Any, where: Path) -> tuple[str, str]:
    return as_text(take(row, ("img_path",), str(where))), as_text(take(row, ("question",), str(where)))


def _answer(item: Any, options: list[str], where: str) -> int:
    answer = as_text(take(item, ("correct_ans", "answer"), where)).strip()
    if answer in options:
        return options.index(answer)
    if len(answer) == 1 and answer in LETTERS[: len(options)]:
        return LETTERS.index(answer)
    raise PredictionError(f"{where}: the right answer {answer!r} is none of {options}")


def _score(name: str, predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = None
    if annotations is not None:
        rows = read_annotation_rows(annotations)
        gold = {_key(row, annotations): row for row in rows}
        if len(gold) != len(rows):
            raise PredictionError(f"{annotations}: a question about one picture occurs twice")
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        lambda r: _key(r, predictions),
        lambda r: take(r, _TEXT, str(predictions)),
        problems,
    )
    total, kinds, concerns, unparsed = Tally(), Tally(), Tally(), 0
    for key, row in found.items():
        item = row if gold is None else gold[key]
        where = f"{annotations or predictions}: {key[0]}"
        options = [as_text(o).strip() for o in take(item, ("candidates",), where)]
        choice, _ = match_option(as_text(take(row, _TEXT, where)), options)
        unparsed += choice is None
        right = choice == _answer(item, options, where)
        total.add("all", right)
        if "type" in item:
            kinds.add(f"type {item['type']}", right)
        if "concern" in item:
            concerns.add(f"concern {item['concern']}", right)
    return score_result(
        name,
        n=total.n,
        unparsed=unparsed,
        score=ratio(total.right, total.n),
        unit="fraction",
        subtasks=kinds.accuracy() | concerns.accuracy(),
        groups={},
        problems=problems,
        correct=total.right,
    )


def _benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        unit="fraction",
        score_files=lambda predictions, annotations: _score(name, predictions, annotations),
        predictions="JSON objects {img_path, question, candidates, response}, also correct_ans",
        annotations="",
        official="Q-Bench A1 accuracy, letters or option texts",
    )


BENCHMARK = _benchmark("q_bench")
BENCHMARK_ZH = _benchmark("q_bench_zh")
