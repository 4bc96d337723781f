"""MMBench and MMBench-CN (Liu et al. 2023): circular evaluation.

Rotations of a question share `index % 1_000_000`; a question is right only if all its rotations are. Follows
VLMEvalKit's `mcq_circular_eval` with exact matching (no GPT matcher). A file without any rotation is
scored as vanilla and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.grouping import grouped, load_groups
from mllm_jax.evaluation.option_match import infer_option
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
from mllm_jax.evaluation.table_files import is_absent, read_table

ROTATION = 1_000_000
TABLES = (".tsv", ".csv", ".xlsx")
_TEXT = ("prediction", "text")


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> option text; the options end at the first absent one.

    Example:
        >>> options_of({"A": "cat", "B": "dog", "C": None, "D": "nan"})
        {'A': 'cat', 'B': 'dog'}
    """
    options = {}
    for letter in "ABCDEFGH":
        if is_absent(row.get(letter)):
            break
        options[letter] = as_text(row[letter])
    return options


def _index(row: Mapping[str, Any], where: Path) -> int:
    value = take(row, ("index", "question_id"), str(where))
    try:
        number = float(value)
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise PredictionError(f"{where}: index {value!r} is not a whole number")


def _read_predictions(path: Path, problems: Problems) -> list[dict[str, Any]]:
    if path.suffix.lower() in TABLES:
        return [dict(row) for row in read_table(path, problems)]
    rows = read_rows(path, problems)
    for row in rows:
        letters, texts = row.get("option_char"), row.get("options")
        if isinstance(letters, list) and isinstance(texts, list):  # LLaVA's answer file
            row.update(dict(zip(letters, texts, strict=False)))
    return rows


def _read_gold(path: Path) -> dict[int, Mapping[str, Any]]:
    if path.suffix.lower() in TABLES:
        problems = Problems()
        rows: Any = read_table(path, problems)
        if problems.counts:
            raise PredictionError(f"{path}: damaged: {problems.as_dict()}")
    else:
        rows = read_annotation_rows(path)
    return {_index(row, path): row for row in by_id(rows, ("index", "question_id"), path).values()}


def _with_rotations(
    gold: dict[int, Mapping[str, Any]], rows: list[dict[str, Any]], where: Path
) -> dict[int, Mapping[str, Any]]:
    """Adds rotations that only the predictions have (with their answer) to annotations of base questions."""
    gold = dict(gold)
    for row in rows:
        index = _index(row, where)
        if index not in gold and index % ROTATION in gold and not is_absent(row.get("answer")):
            gold[index] = row
    return gold


def _missing_rotations(gold: Mapping[int, Mapping[str, Any]], problems: Problems) -> set[int]:
    """Reports base questions whose rotations are not all there and returns them.

    A question has as many rotations as options, or one fewer if the last option ("none of the above"
    and the like) keeps its place in all of them, as in 53 questions of the dev set.
    """
    turns: dict[int, list[int]] = {}
    for index in gold:
        turns.setdefault(index % ROTATION, []).append(index // ROTATION)
    broken = set()
    for base, present in turns.items():
        options = [options_of(gold[base + turn * ROTATION]) for turn in present]
        wanted = set(range(len(options[0])))
        fixed = len(present) > 1 and len({list(o.values())[-1] if o else "" for o in options}) == 1
        if fixed and len(wanted) > 1:
            wanted.discard(len(wanted) - 1)
        for turn in sorted(wanted - set(present)):
            problems.add("missing", f"index {base + turn * ROTATION}")
            broken.add(base)
    return broken


def _score(name: str, predictions: Path, annotations: Path | None, groups: Path | None) -> dict[str, Any]:
    problems = Problems()
    rows = _read_predictions(predictions, problems)
    trusted = False  # whether the annotations themselves list every rotation
    if annotations is not None:
        gold = _read_gold(annotations)
        trusted = any(index >= ROTATION for index in gold)
        gold = _with_rotations(gold, rows, predictions)
    else:
        gold = {_index(row, predictions): row for row in rows}
    found = match_ids(
        rows,
        gold,
        lambda r: _index(r, predictions),
        lambda r: take(r, _TEXT, str(predictions)),
        problems,
    )
    right: dict[int, bool] = {}
    unparsed = 0
    for index, row in found.items():
        item = gold[index]
        options = options_of(item) or options_of(row)
        letter = infer_option(as_text(take(row, _TEXT, str(predictions))), options)
        unparsed += letter not in options
        right[index] = letter == as_text(take(item, ("answer",), f"{annotations or predictions}: {index}"))
    circular = any(index >= ROTATION for index in gold)
    broken = {index % ROTATION for index in gold if index not in found}
    if circular and not trusted:
        broken |= _missing_rotations(gold, problems)
    bases: dict[int, list[int]] = {}
    for index in right:
        bases.setdefault(index % ROTATION, []).append(index)
    whole = {base: indices for base, indices in bases.items() if base not in broken}
    category, level2 = Tally(), Tally()
    for indices in whole.values():
        item = next(gold[i] for i in sorted(indices))
        ok = all(right[i] for i in indices)
        if not is_absent(item.get("category")):
            category.add(as_text(item["category"]), ok)
        if not is_absent(item.get("l2-category")):
            level2.add(as_text(item["l2-category"]), ok)
    correct = sum(all(right[i] for i in indices) for indices in whole.values())
    vanilla = [ok for index, ok in right.items() if index < ROTATION]
    grouping = grouped("mmbench", category.counts(), load_groups(groups))
    return score_result(
        name,
        n=len(whole),
        unparsed=unparsed,
        score=ratio(correct, len(whole)),
        unit="fraction",
        subtasks=category.accuracy(),
        groups=grouping["micro"],
        problems=problems,
        evaluation="circular" if circular else "vanilla (no rotations in the files)",
        correct=correct,
        counts=category.counts(),
        l2_category=level2.accuracy(),
        l2_counts=level2.counts(),
        group_scores=grouping,
        vanilla_accuracy=ratio(sum(vanilla), len(vanilla)),
        vanilla_correct=sum(vanilla),
        rows=len(right),
        row_correct=sum(right.values()),
        row_accuracy=ratio(sum(right.values()), len(right)),
    )


def _benchmark(name: str) -> Benchmark:
    def score_files(
        predictions: Path, annotations: Path | None, groups: Path | None = None
    ) -> dict[str, Any]:
        return _score(name, predictions, annotations, groups)

    return Benchmark(
        name=name,
        unit="fraction",
        score_files=score_files,
        predictions="rows {index, prediction, A-D, answer}, LLaVA's answer file, or the submission XLSX",
        annotations="",
        official="VLMEvalKit mcq_circular_eval, exact matching",
        options=("groups",),
    )


BENCHMARK = _benchmark("mmbench")
BENCHMARK_CN = _benchmark("mmbench_cn")
