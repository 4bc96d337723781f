"""MMMU-Pro (Yue et al. 2024b): up to ten options, or question and options inside the picture.

The official code draws an unseeded random option for unreadable answers, which nobody can reproduce:
here they count as wrong, are counted, and the accuracy that such draws give on average stands beside
the headline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.benchmarks.mmmu_parse import strip_ends
from mllm_jax.evaluation.option_match import LETTERS
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


def find_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer names, or None where the official code draws at random.

    After the last "Answer:" a single letter decides. Else candidates are letters in parentheses,
    letters before a blank, letters before a full stop, or, in answers of more than five words, options
    whose text occurs; among several the latest (a letter before a blank or stop is located as a
    free-standing one, as upstream does).

    Example:
        >>> find_choice("So it is B.\\nAnswer: (D)", {"B": "cat", "D": "dog"})
        'D'
    """
    at = text.rfind("Answer:")
    if at != -1:
        tail = text[at + len("Answer:") :].strip()
        named = [letter for letter in options if letter in tail]
        if len(named) == 1:
            return named[0]
    text = f" {strip_ends(text)} "
    for occurs, located in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if occurs.format(letter) in text]
        if found:
            return _latest(found, [located.format(letter) for letter in found], text)
    if len(text.split()) > 5:
        lower = text.lower()
        found = [letter for letter, option in options.items() if option.lower() in lower]
        if found:
            return _latest(found, [options[letter].lower() for letter in found], lower)
    return None


def _latest(letters: Sequence[str], needles: Sequence[str], text: str) -> str:
    places = [text.rfind(needle) for needle in needles]
    return letters[places.index(max(places))]


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    rows = read_rows(predictions, problems)
    gold = None
    if annotations is not None:
        gold = by_id(read_annotation_rows(annotations), ("id", "question_id"), annotations)
    found = match_ids(
        rows,
        gold,
        lambda r: str(take(r, ("id", "question_id"), str(predictions))),
        lambda r: take(r, ("response", "text"), str(predictions)),
        problems,
    )
    tally, unparsed, expected = Tally(), 0, 0.0
    for key, row in found.items():
        item = row if gold is None else {**row, **gold[key]}
        where = f"{predictions}: {key}"
        options = dict(zip(LETTERS, map(as_text, _options(item, where)), strict=False))
        choice = find_choice(as_text(take(row, ("response", "text"), where)), options)
        right = choice == take(item, ("answer",), where)
        if choice is None:
            unparsed += 1
            expected += ratio(1, len(options))
        tally.add(as_text(take(item, ("subject",), where)), right)
    return score_result(
        "mmmu_pro",
        n=tally.n,
        unparsed=unparsed,
        score=ratio(tally.right, tally.n, 100),
        unit="percent",
        subtasks=tally.accuracy(100),
        groups={},
        problems=problems,
        correct=tally.right,
        counts=tally.counts(),
        random_fallbacks_upstream=unparsed,
        expected_score_with_random_fallbacks=ratio(tally.right + expected, tally.n, 100),
    )


def _options(item: Mapping[str, Any], where: str) -> list[Any]:
    options = take(item, ("options",), where)
    if isinstance(options, str):  # the data set's own files hold the list as text
        import ast

        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError) as error:
            raise PredictionError(f"{where}: options are no list: {options[:60]!r}") from error
    if not isinstance(options, list) or not 0 < len(options) <= len(LETTERS):
        raise PredictionError(f"{where}: options must be a list of 1 to 26 texts")
    return options


BENCHMARK = Benchmark(
    name="mmmu_pro",
    unit="percent",
    score_files=_score_files,
    predictions="JSON lines {id, subject, options, answer, response}",
    annotations="",
    official="MMMU mmmu-pro/evaluate.py, unreadable answers counted as wrong",
)
