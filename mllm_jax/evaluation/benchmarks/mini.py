"""The project's own benchmark, scored with circular evaluation.

One row per question and rotation of its options:
`{question_id, rotation, ability, group, options, answer, text}`. A question is right only if every rotation
is answered right (Liu et al. 2023, "MMBench", sec. 4.1). Open rows have no options (empty or absent) and are
right if the normalised answer is the normalised expected one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.option_match import LETTERS, match_option, plain
from mllm_jax.evaluation.predictions import Problems, as_text, match_ids, read_rows, score_result, take
from mllm_jax.evaluation.vqa_normalize import m4c_normalize

GROUPS = ("coarse", "fine", "reasoning")


def same_answer(text: str, answer: str) -> bool:
    """Exact match after normalisation; where that leaves nothing (the letter "A") the plain texts decide."""
    left, right = m4c_normalize(text), m4c_normalize(answer)
    return left == right if left and right else plain(text) == plain(answer)


def answer_index(row: Mapping[str, Any]) -> int:
    """The right option of a choice row, whose `answer` is the option's text or, failing that, its letter.

    Raises:
        ValueError: the answer is neither; names the question.
    """
    options, answer = [as_text(o) for o in row["options"]], as_text(row["answer"]).strip()
    if answer in options:
        return options.index(answer)
    if len(answer) == 1 and answer.upper() in LETTERS[: len(options)]:
        return LETTERS.index(answer.upper())
    raise ValueError(
        f"mini question {row['question_id']!r}: answer {answer!r} is neither an option's text nor a letter "
        f"of {options}"
    )


def judge_row(row: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether one row is right, and how its text was read: `option_text`, `letter`, `contained_text`, `open`
    or `unparsed`."""
    text = as_text(row.get("text"))
    if row.get("options"):
        index, how = match_option(text, [as_text(o) for o in row["options"]])
        return index is not None and index == answer_index(row), how
    if not text.strip():
        return False, "unparsed"
    return same_answer(text, as_text(row["answer"])), "open"


def _check_rotations(questions: Mapping[Any, Sequence[Mapping[str, Any]]], problems: Problems) -> list[Any]:
    """Questions with all rotations 0..k-1, k being the most that any question with as many options has."""
    most: dict[int, int] = defaultdict(int)
    for rows in questions.values():
        size = len(rows[0].get("options") or ())
        most[size] = max(most[size], *(int(row.get("rotation") or 0) + 1 for row in rows))
    whole = []
    for key, rows in questions.items():
        wanted = set(range(most[len(rows[0].get("options") or ())]))
        absent = sorted(wanted - {int(row.get("rotation") or 0) for row in rows})
        for rotation in absent:
            problems.add("missing", f"question {key!r} rotation {rotation}")
        if not absent:
            whole.append(key)
    return whole


def score_mini(rows: Iterable[Mapping[str, Any]], problems: Problems | None = None) -> dict[str, Any]:
    """Scores `mini` rows; pure.

    Args:
        rows: `{question_id, rotation, ability, group, options, answer, text}`, see the module's text.
        problems: what the reader of the file already met, if any.

    Returns:
        The object of the score contract (`score` is a fraction): `subtasks` by ability, `groups` as the
        mean of the group's abilities; further `micro_groups` (questions pooled), `vanilla` (rotation 0 only),
        `row_accuracy`, `counts` (ability -> [right, questions]) and `parsed` (how -> rows).

    Raises:
        ValueError: a row lacks a key, or its answer is none of its options; names the question.
    """
    problems = Problems() if problems is None else problems
    rows = list(rows)
    for row in rows:
        for key in ("question_id", "ability", "group", "answer"):
            take(row, (key,), f"mini question {row.get('question_id')!r}")
    found = match_ids(
        rows,
        None,
        lambda r: (r["question_id"], int(r.get("rotation") or 0)),
        lambda r: r.get("text"),
        problems,
    )
    questions: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for (question, _), row in found.items():
        questions[question].append(row)
    how: Counter[str] = Counter()
    right_rows = 0
    right: dict[Any, list[bool]] = {}
    first: dict[Any, bool] = {}
    for question, group in questions.items():
        right[question] = []
        for row in sorted(group, key=lambda r: int(r.get("rotation") or 0)):
            ok, parsed = judge_row(row)
            how[parsed] += 1
            right_rows += ok
            right[question].append(ok)
        first[question] = right[question][0]
    whole = _check_rotations(questions, problems) if questions else []
    if not questions:
        problems.add("missing", "every question: there are no rows")

    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for question in whole:
        row = questions[question][0]
        cell = counts[(row["group"], row["ability"])]
        cell[0] += all(right[question])
        cell[1] += 1
    subtasks = {ability: r / n for (_, ability), (r, n) in counts.items()}
    groups, micro = {}, {}
    for name in dict.fromkeys((*GROUPS, *(g for g, _ in counts))):
        cells = [cell for (g, _), cell in counts.items() if g == name]
        if cells:
            groups[name] = sum(r / n for r, n in cells) / len(cells)
            micro[name] = sum(r for r, _ in cells) / sum(n for _, n in cells)
    total = sum(r for r, _ in counts.values())
    return score_result(
        "mini",
        n=len(whole),
        unparsed=how["unparsed"],
        score=total / len(whole) if whole else 0.0,
        unit="fraction",
        subtasks=subtasks,
        groups=groups,
        problems=problems,
        micro_groups=micro,
        vanilla=sum(first.values()) / len(first) if first else 0.0,
        row_accuracy=right_rows / len(found) if found else 0.0,
        rows=len(found),
        counts={ability: list(cell) for (_, ability), cell in counts.items()},
        parsed=dict(how),
    )


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    rows = read_rows(predictions, problems)
    if annotations is not None:  # the answers and options come from there, the text from the predictions
        key = ("question_id", "rotation")
        gold = {tuple(r.get(k) or 0 for k in key): r for r in read_rows(annotations, problems)}
        found = match_ids(
            rows, gold, lambda r: tuple(r.get(k) or 0 for k in key), lambda r: r.get("text"), problems
        )
        problems.counts.pop("empty_answer", None)  # counted again below, on the same rows
        problems.first.pop("empty_answer", None)
        rows = [{**gold[i], "text": row.get("text")} for i, row in found.items()]
    return score_mini(rows, problems)


BENCHMARK = Benchmark(
    name="mini",
    unit="fraction",
    score_files=_score_files,
    predictions="JSON lines {question_id, rotation, ability, group, options, answer, text}",
    annotations="",
    official="this project; circular evaluation as in MMBench",
)
