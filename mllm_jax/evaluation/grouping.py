"""Sub-tasks grouped into coarse perception, fine perception and reasoning: the lens of the first paper.

The mapping is data (`groups.json`): benchmark -> sub-task -> {group, status}. `status` is `verified`
for the twelve MMBench sub-tasks on the paper's radar chart and `proposed` for all others, which are our
reading. The paper does not state how sub-tasks are combined, so every aggregation is offered under its
own name.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.data.reading import DataError, read_object
from mllm_jax.schema import did_you_mean
from mllm_jax.storage import Path, as_path

GROUPS = ("coarse", "fine", "reasoning")
AGGREGATIONS = ("micro", "macro", "sum", "normalised")
DEFAULT_FILE = pathlib.Path(__file__).with_name("groups.json")
_STATUS = ("verified", "proposed", "authors")
_MME_FULL = 200.0  # points of one MME sub-task


@dataclasses.dataclass(frozen=True)
class Entry:
    """One sub-task's group and where the assignment comes from (`verified`, `proposed` or `authors`)."""

    group: str
    status: str
    note: str = ""


Table = dict[str, dict[str, Entry]]


def load_groups(path: Path | None = None) -> Table:
    """Reads a grouping file (the one shipped with the package if None).

    Raises:
        ValueError: the file is no valid grouping; names the entry.
    """
    path = DEFAULT_FILE if path is None else as_path(path)
    try:
        raw = read_object(path)
    except DataError as error:
        raise ValueError(
            f"{path}: not a readable grouping file ({error}); start from {DEFAULT_FILE.name}"
        ) from error
    table: Table = {}
    for benchmark, entries in raw.items():
        if benchmark == "about":
            continue
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: {benchmark!r} must map sub-tasks to entries")
        table[benchmark] = {}
        for name, entry in entries.items():
            if not isinstance(entry, dict) or "group" not in entry or entry.get("status") not in _STATUS:
                raise ValueError(f"{path}: {benchmark!r} / {name!r} needs a group and a status of {_STATUS}")
            if unknown := set(entry) - {"group", "status", "note"}:
                raise ValueError(f"{path}: {benchmark!r} / {name!r} has unknown keys {sorted(unknown)}")
            table[benchmark][name] = Entry(str(entry["group"]), entry["status"], str(entry.get("note", "")))
    return table


def ability_of(row: Mapping[str, Any]) -> str:
    """The sub-task of a question's stored row, "" if it has none."""
    return str(row.get("question_type") or row.get("ability") or "")


def paper_axes(kind: str, table: Table | None = None) -> list[str]:
    """Sub-tasks on the paper's radar chart (status `verified`), group by group; [] for benchmarks without.

    Args:
        kind: a benchmark; `mmbench_cn` has the sub-tasks of `mmbench`.
        table: a loaded grouping; the package's own if None.
    """
    entries = (load_groups() if table is None else table).get(kind.removesuffix("_cn"), {})
    verified = [name for name, entry in entries.items() if entry.status == "verified"]
    order = [*GROUPS, *(entry.group for entry in entries.values())]
    return sorted(verified, key=lambda name: order.index(entries[name].group))


def group_scores(
    benchmark: str,
    subtasks: Mapping[str, float | Sequence[int]],
    how: str,
    table: Table | None = None,
) -> dict[str, float]:
    """Group -> aggregated score; groups without a sub-task are left out.

    Args:
        benchmark: a key of the table, e.g. `mmbench`, `mme`, `mme_authors`.
        subtasks: sub-task -> score, or -> (right, questions) for `micro`.
        how: `micro` (questions pooled), `macro` (mean over sub-tasks), `sum`, or `normalised` to 0-100
            (MME: points / (2 k) for k sub-tasks; fractions: 100 * macro).
        table: a loaded grouping; the package's own if None.

    Raises:
        ValueError: an unknown aggregation, or a sub-task that the grouping does not have (with the
            nearest name).
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"no aggregation {how!r}; there are {AGGREGATIONS}")
    table = load_groups() if table is None else table
    entries = table.get(benchmark)
    if entries is None:
        raise ValueError(f"the grouping has no benchmark {benchmark!r}; it has {sorted(table)}")
    members: dict[str, list[Any]] = {}
    for name, value in subtasks.items():
        if name not in entries:
            raise ValueError(
                f"the grouping of {benchmark!r} has no sub-task {name!r}; {did_you_mean(name, entries)}add it to the "
                "file"
            )
        members.setdefault(entries[name].group, []).append(value)
    order = [g for g in GROUPS if g in members] + [g for g in members if g not in GROUPS]
    return {group: _aggregate(benchmark, members[group], how) for group in order}


def _aggregate(benchmark: str, values: Sequence[Any], how: str) -> float:
    if how == "micro":
        return sum(right for right, _ in values) / max(1, sum(n for _, n in values))
    if how == "sum":
        return sum(values)
    if how == "macro":
        return sum(values) / len(values)
    full = _MME_FULL if benchmark.startswith("mme") else 1.0
    return 100.0 * sum(values) / (full * len(values))


def grouped(
    benchmark: str, counts: Mapping[str, Sequence[int]], table: Table | None = None
) -> dict[str, dict[str, float]]:
    """Micro, macro and normalised group scores from sub-task -> (right, questions), scores as fractions."""
    table = load_groups() if table is None else table
    accuracy = {name: right / n for name, (right, n) in counts.items() if n}
    return {
        "micro": group_scores(benchmark, counts, "micro", table),
        "macro": group_scores(benchmark, accuracy, "macro", table),
        "normalised": group_scores(benchmark, accuracy, "normalised", table),
    }
