"""Scores as rows of a table: groups and abilities, the model beside its blind self and the majority answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mllm_jax import escape
from mllm_jax.console import print_table

# Column -> where the score contract's object of that condition is found in `scores.json`.
COLUMNS: dict[str, tuple[str, ...]] = {
    "model": (),
    "single frame": ("single_frame",),
    "blind": ("blind",),
    "majority": ("majority",),
    "likelihood": ("likelihood",),
    "open": ("open", "predictions"),
    "open single frame": ("open", "single_frame"),
    "open blind": ("open", "blind"),
    "open majority": ("open", "majority"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      level: "all", "group" or "ability".
      name: of the group or ability.
      group: of an ability, "" if it has none.
      n: questions; 0 if not counted.
      values: column -> score as a fraction.
    """

    level: str
    name: str
    group: str
    n: int
    values: dict[str, float]


def conditions(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Column -> the score object of that condition, for those that were computed."""
    found = {column: _inside(scores, path) for column, path in COLUMNS.items()}
    return {column: value for column, value in found.items() if value and value.get("score") is not None}


def _inside(value: Any, path: Sequence[str]) -> Any:
    """The value under nested keys; None where it is not there."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def score_rows(scores: Mapping[str, Any], group_of: Mapping[str, str]) -> list[Row]:
    """The table of one benchmark: all, then every group followed by its abilities.

    Args:
      scores: contents of `scores.json`.
      group_of: ability -> group ("" for none), in the order in which abilities are shown.
    """
    found = conditions(scores)
    scale = {"fraction": 1.0, "percent": 0.01, "points": 1.0}.get(str(scores.get("unit")))
    if scores.get("unit") == "points":
        found = {column: _points_as_fractions(value) for column, value in found.items()}
    if not found or scale is None:
        return []

    def values(field: str, name: str) -> dict[str, float]:
        return {c: scale * v[field][name] for c, v in found.items() if name in v[field]}

    counts = scores.get("counts", {})
    rows = [Row("all", "all", "", scores["n"], {c: scale * v["score"] for c, v in found.items()})]
    # Where no question has an ability, the part "all" is the first row again.
    only_all = list(scores["subtasks"]) == ["all"]
    for group in dict.fromkeys(group_of.values()):
        members = [a for a, g in group_of.items() if g == group and a in scores["subtasks"]]
        sizes = [counts.get(ability, (0, 0))[1] for ability in members]
        if group in scores["groups"]:
            rows.append(Row("group", group, group, sum(sizes), values("groups", group)))
        for ability, size in zip(members, sizes, strict=True):
            if not only_all:
                rows.append(Row("ability", ability, group, size, values("subtasks", ability)))
    return rows


def _points_as_fractions(scores: Mapping[str, Any]) -> dict[str, Any]:
    """MME's points as shares of the highest: 200 per sub-task, 2000 for perception, which is its headline."""
    return {
        "score": scores["score"] / 2000,
        "subtasks": {name: points / 200 for name, points in scores["subtasks"].items()},
        "groups": {name: percent / 100 for name, percent in scores["group_normalised"].items()},
    }


# How group scores are combined -> where the score contract's object holds them, and their factor for percent.
_COMBINED = {
    "micro, %": (("group_scores", "micro"), ("micro_groups",)),
    "macro, %": (("group_scores", "macro"), ("groups",)),
    "normalised, 0–100": (("group_scores", "normalised"), ("group_normalised",)),
    "sum, points": (("groups",),),
    "mean, points": (("group_mean",),),
}


def combined_groups(scores: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """How sub-tasks were combined -> group -> value as text; {} for a benchmark without groups.

    Micro pools the questions, macro is the mean over sub-tasks; MME has sums and means of points instead.
    """
    points = scores.get("unit") == "points"
    if not scores.get("groups"):
        return {}
    found = {}
    for name, places in _COMBINED.items():
        if name.endswith("points") != points and not name.startswith("normalised"):
            continue
        value = next(filter(None, (_inside(scores, path) for path in places)), None)
        if value:
            factor = 100 if name.endswith("%") else 1
            found[name] = {group: f"{factor * one:.1f}" for group, one in value.items()}
    return found


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Columns that hold anything, in order."""
    return [column for column in COLUMNS if any(column in row.values for row in rows)]


def label(name: str) -> str:
    """A name for people: underscores become blanks."""
    return name.replace("_", " ")


def percent(value: float | None) -> str:
    """`0.875` as `87.5`; a dash where there is nothing."""
    return "–" if value is None else f"{100 * value:.1f}"


def print_scores(console: Console, title: str, rows: Sequence[Row]) -> None:
    """The table for the terminal, in percent."""
    columns = columns_of(rows)
    cells, styles = [], []
    for row in rows:
        indent = "  " if row.level == "ability" and row.group else ""
        cells.append(
            (indent + label(row.name), str(row.n or ""), *(percent(row.values.get(c)) for c in columns))
        )
        styles.append({"all": "bold", "group": "bold cyan", "ability": ""}[row.level])
    print_table(console, ("", "n", *(f"{column} %" for column in columns)), cells, title, styles)


def markdown_table(rows: Sequence[Row]) -> str:
    """The same table as Markdown."""
    columns = columns_of(rows)
    cells = [
        (label(row.name), str(row.n or ""), *(percent(row.values.get(column)) for column in columns))
        for row in rows
    ]
    strong = {index for index, row in enumerate(rows) if row.level != "ability"}
    return escape.markdown_table(("", "n", *(f"{column} %" for column in columns)), cells, strong)


def row_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON-able dicts; `rows_from_dicts` is the inverse."""
    return [dataclasses.asdict(row) for row in rows]


def rows_from_dicts(dicts: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows from what `row_dicts` made."""
    return [Row(**values) for values in dicts]
