"""Strict reading of prediction files: nothing is dropped without being counted and named.

A file may hold JSON lines, one JSON array, one JSON object (id -> value) or JSON objects written one after
another without separators (Q-Bench does). What cannot be read is reported in a `Problems` object with a
count and the first offenders; questions that are left without an answer make the file incomplete, and
`score_result` then withholds the score.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from mllm_jax.storage import Path, as_path

Row = Mapping[str, Any]  # of a file: an answer, an annotation
_SHOWN = 5  # offenders listed per kind of problem
_SPACE = re.compile(r"\s*")
_BROKEN = (ValueError, RecursionError)  # what the JSON decoder raises
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# What leaves a question without one definite answer. The other kinds are reported, and the score stands.
BLOCKING = ("missing", "conflicting_duplicate")


class BenchmarkError(ValueError):
    """A benchmark that cannot be asked or scored; the message names file and question."""


class PredictionError(BenchmarkError):
    """A file that cannot be scored at all; the message names the file and the fix."""


class Problems:
    """Counts per kind of problem, with the first offenders.

    Example:
        >>> p = Problems()
        >>> p.add("missing", "question 7")
        >>> p.as_dict()
        {'missing': {'count': 1, 'first': ['question 7']}}
        >>> p.blocking
        True
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.first: dict[str, list[str]] = {}

    def add(self, kind: str, offender: Any, count: int = 1) -> None:
        """Records `count` problems of a kind and keeps the offender if it is among the first."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        shown = self.first.setdefault(kind, [])
        if len(shown) < _SHOWN:
            shown.append(str(offender))

    @property
    def blocking(self) -> bool:
        """Whether some question has no definite answer, so that no complete score exists."""
        return any(self.counts.get(kind) for kind in BLOCKING)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """`{kind: {"count": int, "first": [str, ...]}}`, empty when all is well."""
        return {kind: {"count": n, "first": self.first[kind]} for kind, n in self.counts.items()}


def read_text(path: Path, problems: Problems) -> str:
    """Decodes a text file: UTF-8; a byte order mark and UTF-16 are accepted and reported.

    Bytes that are no UTF-8 become U+FFFD and every line that has some is reported as `wrong_encoding`; the JSON
    reader then leaves the damaged rows out.
    """
    raw = path.read_bytes()
    if raw.startswith(_UTF16):
        problems.add("wrong_encoding", f"{path.name}: UTF-16 (read as such); write UTF-8")
        return raw.decode("utf-16", errors="replace")
    if raw.startswith(codecs.BOM_UTF8):
        problems.add("byte_order_mark", path.name)
        raw = raw[len(codecs.BOM_UTF8) :]
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        for number, line in enumerate(raw.split(b"\n"), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                problems.add("wrong_encoding", f"{path.name} line {number}: {error.reason}")
        return raw.decode("utf-8", errors="replace")


def read_json(path: Path, problems: Problems) -> Any:
    """One JSON value, or the list of the rows of a JSON lines file (see the module's text).

    Raises:
        PredictionError: the file does not exist or holds no JSON at all.
    """
    path = as_path(path)
    if not path.is_file():
        found = "is a folder; give a file in it" if path.is_dir() else "no such file"
        raise PredictionError(f"{path}: {found}: an answer or annotation file is needed")
    before = problems.counts.get("wrong_encoding", 0)
    text = read_text(path, problems)
    damaged = problems.counts.get("wrong_encoding", 0) > before
    try:
        value = json.loads(text)
    except _BROKEN:
        value = _read_broken_array(path, text, problems) or _read_lines(path, text, problems)
    if damaged:
        value = _without_damage(value)
    if value == []:
        hint = "; it looks half-written" if text.lstrip()[:1] in ("{", "[") and text.strip() != "[]" else ""
        raise PredictionError(f"{path}: no JSON found{hint}; expected JSON lines, an array or an object")
    return value


def _without_damage(value: Any) -> Any:
    """Rows (or entries of a map) without replacement characters: a damaged answer is never scored."""

    def whole(part: Any) -> bool:
        return "\ufffd" not in json.dumps(part, ensure_ascii=False)

    if isinstance(value, dict):
        return {key: part for key, part in value.items() if whole([key, part])}
    return [row for row in value if whole(row)] if isinstance(value, list) else value


def _read_broken_array(path: Path, text: str, problems: Problems) -> list[Any]:
    """The whole rows of a JSON array that ends early; none if the text is no array of objects."""
    if not text.lstrip().startswith("["):
        return []
    rows, _ = _read_values(text, text.index("[") + 1, ",")
    rows = list(itertools.takewhile(lambda row: isinstance(row, dict), rows))
    if rows:
        problems.add("unreadable_line", f"{path.name}: the JSON array breaks off after {len(rows)} rows")
    return rows


def _read_values(text: str, at: int, between: str) -> tuple[list[Any], int]:
    """The JSON values from a place on, with `between` and white space between them, and where they end."""
    decoder, rows = json.JSONDecoder(), []
    while True:
        at = _SPACE.match(text, at).end()
        try:
            row, at = decoder.raw_decode(text, at)
        except _BROKEN:
            return rows, at
        rows.append(row)
        at = _SPACE.match(text, at).end()
        if text[at : at + len(between)] != between:
            return rows, at
        at += len(between)


def _read_lines(path: Path, text: str, problems: Problems) -> list[Any]:
    # Split at \n only: str.splitlines would cut inside strings that hold U+2028 or similar.
    rows: list[Any] = []
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except _BROKEN:
            bad.append((number, line))
    if not rows and bad and (several := _read_concatenated(text)):
        return several  # objects across lines, or several on one line
    for number, line in bad:
        several = _read_concatenated(line)
        rows.extend(several)
        if not several:
            problems.add("unreadable_line", f"{path.name} line {number}: {line[:60]!r}")
    return rows


def _read_concatenated(text: str) -> list[Any]:
    rows, end = _read_values(text, 0, "")
    return rows if end == len(text) else []


def read_rows(path: Path, problems: Problems) -> list[dict[str, Any]]:
    """The rows of a JSON lines file or JSON array, each a dict; other values are reported as unreadable.

    Raises:
        PredictionError: the file does not exist, holds no JSON, or no row is a JSON object.
    """
    value = read_json(path, problems)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise PredictionError(f"{path}: expected rows (JSON objects), found one {type(value).__name__}")
    rows = []
    for number, row in enumerate(value, 1):
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.add(
                "unreadable_line", f"{as_path(path).name} row {number}: not a JSON object: {row!r:.60}"
            )
    if not rows:
        raise PredictionError(f"{path}: no row is a JSON object")
    return rows


def read_annotations(path: Path) -> Any:
    """One JSON value or the rows of a JSON lines file; unlike predictions, nothing unreadable is tolerated.

    Raises:
        PredictionError: anything in the file cannot be read; names the first offender.
    """
    problems = Problems()
    value = read_json(path, problems)
    for kind in ("unreadable_line", "wrong_encoding"):
        if problems.counts.get(kind):
            first = f"{kind.replace('_', ' ')}: {problems.first[kind][0]}"
            raise PredictionError(f"{path}: {first}; fetch it again")
    return value


def read_annotation_rows(path: Path) -> list[Any]:
    """The rows of a JSON array or JSON lines file, also of one with a single line.

    Raises:
        PredictionError: see `read_annotations`; or the file holds neither rows nor one row.
    """
    value = read_annotations(path)
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise PredictionError(f"{path}: expected rows (JSON objects)")
    return rows


def as_map(value: Any, keys: Sequence[str]) -> dict[str, Any] | None:
    """The value itself if it maps ids to something; None for rows.

    A JSON lines file of one line reads as one object: it is a row if it has one of the id `keys`.
    """
    return value if isinstance(value, dict) and not set(keys) & set(value) else None


def entries(
    value: Any, keys: Sequence[str], where: Path, problems: Problems | None = None
) -> list[tuple[str, Any]]:
    """(id, value) pairs of a JSON object id -> value, or (id, row) pairs of rows with their id under one of `keys`.

    Raises:
        PredictionError: a row has no id, or, without `problems` to report it to, is no JSON object.
    """
    if (mapping := as_map(value, keys)) is not None:
        return list(mapping.items())
    pairs = []
    for row in value if isinstance(value, list) else [value]:
        if isinstance(row, dict):
            pairs.append((str(take(row, keys, str(where))), row))
        elif problems is None:
            raise PredictionError(f"{where}: expected rows (JSON objects), found {row!r:.60}")
        else:
            problems.add("unreadable_line", f"{as_path(where).name}: not a JSON object: {row!r:.60}")
    return pairs


def by_id(rows: Iterable[Row], keys: Sequence[str], where: Path) -> dict[str, Row]:
    """Annotation rows by `str(id)`, in file order.

    Raises:
        PredictionError: a row has no id, or an id occurs twice.
    """
    return by_key(rows, lambda row: str(take(row, keys, str(where))), where)


def by_key(rows: Iterable[Row], key_of: Callable[[Row], Any], where: Path) -> dict[Any, Row]:
    """The same by what `key_of` says of a row."""
    found: dict[Any, Row] = {}
    for row in rows:
        key = key_of(row)
        if key in found:
            raise PredictionError(f"{where}: id {key!r} occurs twice; annotations need unique ids")
        found[key] = row
    if not found:
        raise PredictionError(f"{where}: no annotations in it")
    return found


def take(row: Row, keys: Sequence[str], where: str) -> Any:
    """The first of `keys` that the row has.

    Raises:
        PredictionError: none is there; names what the row has instead.
    """
    for key in keys:
        if key in row:
            return row[key]
    raise PredictionError(f"{where}: a row has none of the keys {list(keys)}; it has {sorted(row)[:12]}")


def as_text(value: Any) -> str:
    """A stored answer as text: None is the empty answer, numbers and lists as `str` writes them."""
    return "" if value is None else value if isinstance(value, str) else str(value)


def answer_text(value: Any) -> str | None:
    """A stored answer: None is the empty answer, numbers are written out.

    None for what is no answer (NaN, infinity, true or false, lists, objects), which must not count as their text.

    Example:
        >>> [answer_text(v) for v in ("cat", None, 3, float("nan"), ["cat"])]
        ['cat', '', '3', None, None]
    """
    if value is None or isinstance(value, str):
        return value or ""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if number else None


def match_ids(
    rows: Iterable[Row],
    expected: Iterable[Hashable] | None,
    id_of: Callable[[Row], Hashable],
    answer_of: Callable[[Row], Any],
    problems: Problems,
) -> dict[Hashable, Row]:
    """One row per question id, in file order; the last row of a repeated id stays.

    Args:
        rows: the prediction rows.
        expected: every id of the annotations, or None when the predictions are all there is.
        id_of: a row's question id.
        answer_of: a row's raw answer.
        problems: receives `duplicate` (the same answer again), `conflicting_duplicate`, `unknown` (id not in
            the annotations; the row is left out), `missing` and `empty_answer`.
    """
    known = None if expected is None else set(expected)
    found: dict[Hashable, Row] = {}
    for row in rows:
        key = id_of(row)
        if known is not None and key not in known:
            problems.add("unknown", key)
            continue
        if key in found:
            same = answer_of(found[key]) == answer_of(row)
            problems.add("duplicate" if same else "conflicting_duplicate", key)
        elif not as_text(answer_of(row)).strip():
            problems.add("empty_answer", key)
        found[key] = row
    if expected is not None:
        for key in dict.fromkeys(expected):
            if key not in found:
                problems.add("missing", key)
    return found


def score_result(
    benchmark: str,
    *,
    n: int,
    unparsed: int,
    score: float | None,
    unit: str,
    subtasks: Mapping[str, Any],
    groups: Mapping[str, Any],
    problems: Problems,
    **figures: Any,
) -> dict[str, Any]:
    """The JSON object of the score contract.

    `score`, `subtasks` and `groups` are filled in only when every question has one definite answer. Otherwise
    they are None and empty, and what was computed **from the answered questions only** is under `partial`.

    Args:
        benchmark: the benchmark's name.
        n: questions that were scored.
        unparsed: answers that no rule could read.
        score: the headline number, in `unit`.
        unit: `fraction`, `percent` or `points`, as the official scorer prints it.
        subtasks: sub-task name -> score.
        groups: coarse, fine, reasoning -> score, where the benchmark has them.
        problems: what the reader met.
        **figures: further figures under their own names.
    """
    head = {"benchmark": benchmark, "n": n, "unparsed": unparsed}
    body = {"score": score, "unit": unit, "subtasks": dict(subtasks), "groups": dict(groups)}
    tail = {"complete": not problems.blocking, "problems": problems.as_dict()}
    if not problems.blocking:
        return head | body | figures | tail
    withheld = {"score": None, "unit": unit, "subtasks": {}, "groups": {}}
    note = {"note": "computed from the answered questions only; not comparable with published numbers"}
    return head | withheld | tail | {"partial": note | {"answered": n} | body | figures}
