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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mllm_jax.data.reading import read_object
from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.base import UNUSABLE
from mllm_jax.evaluation.predictions import PredictionError, Problems, read_json
from mllm_jax.evaluation.reproduce_rows import READINGS, readings


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
class _Layout:
    """Where a folder keeps the answers that an entry of its `expected.json` is about (`official_figures.json`).

    Attributes:
        headline: the official figure shown.
        names: pattern of an official figure's path -> our path, parts joined by ">", "*" for the first part there is.
            The first pattern that fits counts; a figure that none fits has the same name here.
        answers: patterns of the answers, the first that exists is taken; `{...}` are parts of the entry's name.
        annotations: the same for the annotations; "" if there are none.
        entry: the entry's name, with its parts as named groups.
        part: where the figures are inside the entry, if it has several.
        skip: what is in the entry and not compared.
        why_skipped: why not.
    """

    headline: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    answers: Sequence[str] = ("{name}.jsonl",)
    annotations: str = ""
    entry: str = "(?P<name>.+)"
    part: str = ""
    skip: Sequence[str] = ()
    why_skipped: str = ""

    def pairs(
        self, expected: Any, result: Mapping[str, Any], path: tuple[str, ...] = ()
    ) -> Iterator[tuple[str, float | int, float | int]]:
        """Name, official value and ours of every figure below a path of the entry."""
        if (ours := self._ours(path)) is not None:
            yield from _flatten(".".join(path), expected, _lookup(result, ours))
        elif isinstance(expected, Mapping):
            for key, value in expected.items():
                yield from self.pairs(value, result, (*path, key))
        else:
            yield from _flatten(".".join(path), expected, _lookup(result, path))

    def _ours(self, path: Sequence[str]) -> Sequence[str] | None:
        for pattern, ours in self.names.items():
            if match := re.fullmatch(pattern, ">".join(path)):
                return match.expand(ours).split(">")
        return None


@dataclasses.dataclass(frozen=True)
class _Case:
    """One comparison: files in the folder, and the official figures."""

    folder: Path
    answers: str
    annotations: Path | None
    expected: Any
    layout: _Layout


def _lookup(result: Any, path: Sequence[str]) -> Any:
    """What is at a path of our figures; NaN if nothing is."""
    for key in path:
        if isinstance(result, list | tuple):
            result = {str(index): value for index, value in enumerate(result)}
        if not isinstance(result, Mapping):
            return math.nan
        result = next(iter(result.values()), math.nan) if key == "*" else result.get(key, math.nan)
    return result


def _layouts() -> dict[str, list[_Layout]]:
    table = read_object(Path(__file__).with_name("official_figures.json"))
    return {name: [_Layout(**one) for one in table[name]] for name in table if name != "about"}


# Parts of an expected.json that are no figures.
_ABOUT = ("published", "note", "notes", "scorer", "eval_type", "prediction_files")


def _find(folder: Path, pattern: str) -> str | None:
    if "*" in pattern:
        return next((path.name for path in sorted(folder.glob(pattern))), None)
    return pattern if (folder / pattern).exists() else None


def _cases(folder: Path) -> Iterator[_Case]:
    """What there is to compare in a data folder.

    Raises:
        ValueError: a folder or an entry that no layout describes, or files that are not there.
    """
    layouts = _layouts()
    if folder.name not in layouts:
        raise ValueError(f"{folder}: no rule for this folder; there are {', '.join(sorted(layouts))}")
    for entry, value in read_json(folder / "expected.json", Problems()).items():
        found = entry in _ABOUT
        for layout in () if found else layouts[folder.name]:
            match = re.fullmatch(layout.entry, entry)
            if match is None or (layout.part and layout.part not in value):
                continue
            places = (_find(folder, pattern.format(**match.groupdict())) for pattern in layout.answers)
            answers = next((place for place in places if place is not None), None)
            if answers is None:
                continue
            annotations = (
                _find(folder, layout.annotations.format(**match.groupdict())) if layout.annotations else None
            )
            figures = value[layout.part] if layout.part else value
            if isinstance(figures, dict):
                figures = {k: v for k, v in figures.items() if k not in (*_ABOUT, *layout.skip)}
            else:
                figures = {entry: figures}
            yield _Case(folder, answers, annotations and folder / annotations, figures, layout)
            found = True
        if not found:
            raise ValueError(f"{folder}: no file of answers belongs to {entry!r} of expected.json")


def _score(case: _Case) -> Comparison:
    started = time.perf_counter()
    result = get_benchmark(case.folder.name).score(case.folder / case.answers, case.annotations)
    if not result["complete"]:  # a file that is a subset of the questions on purpose
        result = result | result["partial"]
    done = _comparison(case, case.layout.headline)
    for name, expected, value in case.layout.pairs(case.expected, result):
        done.figures[name] = (expected, value)
    done.expected, done.obtained = done.figures[case.layout.headline]
    done.seconds = time.perf_counter() - started
    return done


def _comparison(case: _Case, headline: str) -> Comparison:
    return Comparison(case.folder.name, f"{case.folder.name}/{case.answers}".removesuffix("/."), headline)


def check_rows(data: Path) -> tuple[list[Comparison], list[str]]:
    """Compares readings of single answers, where a folder has the official ones: how many of the rows agree.

    Returns:
        As `score_folder`.
    """
    done, failed = [], []
    for name in READINGS:
        folder = Path(data) / name
        if not (folder / "expected.json").is_file():
            continue
        try:
            for case in sorted(_cases(folder), key=lambda case: case.answers):
                done += _compared_rows(case)
        except (ValueError, OSError) as error:
            failed.append(str(error))
    return done, failed


def _compared_rows(case: _Case) -> Iterator[Comparison]:
    """How many readings agree.

    Raises:
        PredictionError: the official readings are not what they should be.
    """
    try:
        for what, pairs in readings(case.folder, case.answers, case.annotations):
            row = _comparison(case, what)
            row.expected, row.obtained = row.figures[what] = (len(pairs), sum(a == b for a, b in pairs))
            yield row
    except UNUSABLE as error:
        if isinstance(error, PredictionError):
            raise
        said = f"{type(error).__name__}: {error}"
        raise PredictionError(
            f"{case.folder / case.answers}: official readings cannot be compared: {said}"
        ) from error


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
    cases: list[_Case] = []
    done, failed = [], []
    for folder in found:
        try:
            cases += _cases(folder)
        except (ValueError, OSError) as error:
            failed.append(str(error))
    with ThreadPoolExecutor(2) as pool:  # METEOR waits for Java: the others run meanwhile
        slow = {id(case): pool.submit(_score, case) for case in cases if case.folder.name == "captions"}
        for case in cases:
            try:
                done.append(slow[id(case)].result() if id(case) in slow else _score(case))
            except (ValueError, OSError, RuntimeError) as error:
                failed.append(str(error))
    return done, failed
