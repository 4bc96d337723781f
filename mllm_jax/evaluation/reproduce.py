"""Scores every answer file of a data folder and compares each figure with the official scorer's.

A data folder has one folder per benchmark with answer files, annotations and an `expected.json` that
holds what the official scorer gives on exactly these files. Every comparison is exact: a difference in
the last digit is a difference.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.predictions import Problems, read_json
from mllm_jax.evaluation.reproduce_rows import CHECKS

Result = dict[str, Any]


@dataclasses.dataclass
class Comparison:
    """One answer file: its headline figure, and how many figures were compared in all.

    Attributes:
        benchmark: the benchmark's name.
        answers: the answer file or folder, relative to the data folder.
        headline: name of the figure shown.
        expected: its official value.
        obtained: ours.
        figures: all compared figures, name -> (expected, obtained).
        seconds: wall time of scoring.
    """

    benchmark: str
    answers: str
    headline: str
    expected: float | int = math.nan
    obtained: float | int = math.nan
    figures: dict[str, tuple[float | int, float | int]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def difference(self) -> float | int:
        return self.obtained - self.expected

    @property
    def differing(self) -> list[str]:
        """Names of the figures that are not equal in every digit."""
        return [name for name, (expected, obtained) in self.figures.items() if expected != obtained]


def _flatten(prefix: str, expected: Any, obtained: Any) -> Iterator[tuple[str, float | int, float | int]]:
    """Every number (or text) below `expected`, with its counterpart; a missing one is NaN."""
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            other = obtained.get(key, math.nan) if isinstance(obtained, Mapping) else math.nan
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), value, other)
    elif isinstance(expected, list):
        if not isinstance(obtained, list) or len(obtained) != len(expected):
            yield prefix, float(len(expected)), math.nan
            return
        for i, (value, other) in enumerate(zip(expected, obtained, strict=True)):
            yield from _flatten(f"{prefix}[{i}]", value, other)
    elif isinstance(expected, bool) or not isinstance(expected, (int, float)):
        yield prefix, 1.0, float(expected == obtained)
    else:
        yield prefix, expected, obtained if isinstance(obtained, (int, float)) else math.nan


@dataclasses.dataclass(frozen=True)
class _Case:
    """One comparison: files in the folder, and which of our figures is which official one."""

    benchmark: str
    answers: str
    annotations: str | None
    headline: str
    expected: Mapping[str, Any]
    obtain: Callable[[Result], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where a folder keeps the answers that an entry of its `expected.json` is about.

    Attributes:
        headline: the official figure shown.
        obtain: our figures under the official names.
        answers: patterns of the answers, the first that exists is taken; `{...}` are parts of the entry's name.
        annotations: the same for the annotations.
        entry: the entry's name, with its parts as named groups.
        part: where the figures are inside the entry, if it has several.
        skip: what is in the entry and not compared.
    """

    headline: str
    obtain: Callable[[Result], Mapping[str, Any]]
    answers: tuple[str, ...] = ("{name}.jsonl",)
    annotations: str | None = None
    entry: str = "(?P<name>.+)"
    part: str = ""
    skip: tuple[str, ...] = ()


def _cells(accuracy: Mapping[str, float], counts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    return {k: {"correct": counts[k][0], "n": counts[k][1], "accuracy": v} for k, v in accuracy.items()}


def _mmmu(r: Result) -> Mapping[str, Any]:
    counts = r["domain_counts"]
    domains = {name: {"num": counts[name][1], "acc": acc} for name, acc in r["domains"].items()}
    names = {"overall": "score", "subjects": "subtasks", "n_random_fallback": "random_fallbacks"}
    return r | {theirs: r[ours] for theirs, ours in names.items()} | {"domains": domains}


def _seed_dimensions(r: Result) -> Mapping[str, Any]:
    cells = _cells(r["subtasks"], r["counts"])
    return {
        "overall": r["image"],
        "dimensions": {f"{i} {name}": cell for i, (name, cell) in enumerate(cells.items(), 1)},
    }


def _renamed(**names: str) -> Callable[[Result], Mapping[str, Any]]:
    """Our figures, and under further official names."""
    return lambda r: {**r, **{theirs: r[ours] for theirs, ours in names.items() if ours in r}}


_MMMU = {"annotations": "answer_dict_val.json", "headline": "overall", "obtain": _mmmu}
_LAYOUTS: dict[str, tuple[_Layout, ...]] = {
    "blink": (
        _Layout(
            "total",
            _renamed(total="score", tasks="subtasks"),
            ("predictions/{name}.json",),
            "val_answers.json",
        ),
    ),
    "captions": (
        _Layout("CIDEr", _renamed(n_images="n"), ("{name}_predictions.json",), "{name}_references.json"),
    ),
    "llava_bench": (
        _Layout("all.relative", lambda r: next(iter(r["runs"].values())), ("*-{name}.jsonl",)),
        _Layout("mean_of_three", _renamed(mean_of_three="score"), (".",), entry="mean_of_three"),
    ),
    "mathvista": (
        _Layout(
            "average.accuracy",
            lambda r: (
                r["breakdown"]
                | {"average": {"accuracy": r["score"], "correct": r["correct"], "total": r["n"]}}
            ),
        ),
    ),
    "mm_vet": (
        _Layout(
            "mean.total",
            dict,
            ("{model}_grades_{runs}.json",),
            "capabilities.json",
            "(?P<model>.+)_(?P<runs>.+)",
        ),
    ),
    "mmbench": (
        _Layout(
            "circular_accuracy",
            _renamed(
                circular_groups="n",
                circular_correct="correct",
                circular_accuracy="score",
                per_row_correct="row_correct",
                per_row_accuracy="row_accuracy",
                vanilla_first_pass_correct="vanilla_correct",
                vanilla_first_pass_accuracy="vanilla_accuracy",
            ),
            skip=("group_size_histogram", "first59"),
        ),
        _Layout(
            "circular_correct",
            lambda r: {
                "n": r["n"],
                "circular_correct": r["correct"],
                "category": r["counts"],
                "l2-category": r["l2_counts"],
            },
            annotations="*_first59.tsv",
            part="first59",
        ),
    ),
    "mme": (_Layout("perception", _renamed(subtasks="details"), ("{name}", "{name}.jsonl"), "ground_truth"),),
    "mmmu": (
        _Layout(answers=("{name}_total_val_output.json",), part="eval_only", **_MMMU),
        _Layout(answers=("{name}_responses.jsonl",), part="parse_and_eval", **_MMMU),
    ),
    "mmmu_pro": (
        _Layout(
            "accuracy_fallback_counted_wrong",
            _renamed(
                total="n",
                correct_fallback_counted_wrong="correct",
                accuracy_fallback_counted_wrong="score",
                n_random_fallback="unparsed",
                subjects_correct_total="counts",
            ),
            # What the authors stored has unseeded random draws in it: nobody can reproduce that figure.
            skip=("accuracy_as_stored_by_authors",),
        ),
    ),
    "nextqa": (
        _Layout(
            "overall.accuracy",
            lambda r: {
                "types": _cells(r["subtasks"], r["counts"]),
                "groups": _cells(r["question_groups"], r["question_group_counts"]),
                "overall": {"correct": r["correct"], "n": r["n"], "accuracy": r["score"]},
            },
            ("{name}.json",),
            "{split}.csv",
            "(?P<name>.+_(?P<split>.+))",
            skip=("official_printout",),
        ),
    ),
    "pope": (
        _Layout("f1", lambda r: r["details"]["all"], ("{name}_answers.jsonl",), "{name}_labels.jsonl"),
        _Layout("mean_f1", lambda r: {**r, **r["details"]}, annotations="."),
    ),
    "relaxed_accuracy": (
        _Layout("relaxed_accuracy", _renamed(relaxed_correct="correct", relaxed_accuracy="score")),
    ),
    "scienceqa": (_Layout("accuracy", _renamed(total="n"), annotations="test_answers.json"),),
    "seed_bench": (
        _Layout("image.accuracy", dict),
        _Layout(
            "overall.accuracy",
            _seed_dimensions,
            annotations="questions_{subset}.jsonl",
            entry="(?P<name>.+)_(?P<subset>.+)_by_dimension",
        ),
    ),
    "textvqa": (_Layout("accuracy", _renamed(accuracy="score"), annotations="val*.json"),),
    "vqav2": (
        _Layout(
            "overall",
            _renamed(overall="score", perAnswerType="subtasks", perQuestionType="per_question_type"),
            ("*_{name}.json",),
            "*_annotations.json",
        ),
    ),
}
_ABOUT = (
    "published",
    "note",
    "notes",
    "scorer",
    "eval_type",
    "prediction_files",
)  # of expected.json: no figures


def _find(folder: Path, pattern: str) -> str | None:
    if "*" in pattern:
        return next((path.name for path in sorted(folder.glob(pattern))), None)
    return pattern if (folder / pattern).exists() else None


def _cases(folder: Path) -> Iterator[_Case]:
    """What there is to compare in a data folder.

    Raises:
        ValueError: a folder or an entry that no layout describes, or files that are not there.
    """
    if folder.name not in _LAYOUTS:
        raise ValueError(f"{folder}: no rule for this folder; there are {', '.join(sorted(_LAYOUTS))}")
    for entry, value in read_json(folder / "expected.json", Problems()).items():
        if entry in _ABOUT:
            continue
        found = False
        for layout in _LAYOUTS[folder.name]:
            match = re.fullmatch(layout.entry, entry)
            if match is None or (layout.part and layout.part not in value):
                continue
            names = match.groupdict()
            places = (_find(folder, pattern.format(**names)) for pattern in layout.answers)
            answers = next((place for place in places if place is not None), None)
            if answers is None:
                continue
            annotations = layout.annotations and _find(folder, layout.annotations.format(**names))
            figures = value[layout.part] if layout.part else value
            if isinstance(figures, dict):
                figures = {k: v for k, v in figures.items() if k not in (*_ABOUT, *layout.skip)}
            else:
                figures = {entry: figures}
            yield _Case(folder.name, answers, annotations, layout.headline, figures, layout.obtain)
            found = True
        if not found:
            raise ValueError(f"{folder}: no file of answers belongs to {entry!r} of expected.json")


def _score(folder: Path, case: _Case) -> Comparison:
    started = time.perf_counter()
    annotations = None if case.annotations is None else folder / case.annotations
    result = get_benchmark(case.benchmark).score(folder / case.answers, annotations)
    if not result["complete"]:  # a file that is a subset of the questions on purpose
        result = result | result["partial"]
    done = Comparison(case.benchmark, f"{folder.name}/{case.answers}".removesuffix("/."), case.headline)
    obtained = case.obtain(result)
    for name, expected, value in _flatten("", case.expected, obtained):
        done.figures[name] = (expected, value)
    done.expected, done.obtained = done.figures[case.headline]
    done.seconds = time.perf_counter() - started
    return done


def check_rows(data: Path) -> list[Comparison]:
    """Compares readings of single answers, where a folder has the official ones: how many of the rows agree."""
    done = []
    for name, check in CHECKS.items():
        if not (Path(data) / name / "expected.json").is_file():
            continue
        for answers, what, pairs in check(Path(data) / name):
            equal = sum(official == ours for official, ours in pairs)
            row = Comparison(name, f"{name}/{answers}", what, len(pairs), equal)
            row.figures[what] = (len(pairs), equal)
            done.append(row)
    return done


def score_folder(data: Path) -> tuple[list[Comparison], list[str]]:
    """Scores everything below a data folder.

    Args:
        data: holds folders such as `mme/` and `pope/`, each with an `expected.json`.

    Returns:
        The comparisons, and what could not be compared: messages that name folder and reason.

    Raises:
        ValueError: no folder in it has an `expected.json`.
    """
    data = Path(data)
    found = sorted(path.parent for path in data.glob("*/expected.json"))
    if not found:
        raise ValueError(f"{data}: no folder in it has an expected.json")
    cases, done, failed = [], [], []
    for folder in found:
        try:
            cases += [(folder, case) for case in _cases(folder)]
        except (ValueError, OSError) as error:
            failed.append(str(error))
    with ThreadPoolExecutor(2) as pool:  # METEOR waits for Java: the others run meanwhile
        slow = {id(case): pool.submit(_score, f, case) for f, case in cases if case.benchmark == "captions"}
        for folder, case in cases:
            try:
                done.append(slow[id(case)].result() if id(case) in slow else _score(folder, case))
            except (ValueError, OSError, RuntimeError) as error:
                failed.append(str(error))
    return done, failed
