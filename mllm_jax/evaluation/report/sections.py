"""What a report consists of, before it is dressed as HTML or Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row. `strong` are the indices of rows that stand out."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()

    def turned(self) -> "Table":
        """Rows as columns."""
        first, *rest = zip(self.head, *self.rows, strict=True)
        return Table(first, tuple(rest))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder."""

    file: str
    description: str


@dataclasses.dataclass(frozen=True)
class Examples:
    """Example answers and, for Markdown, the sheet with the same."""

    items: Sequence[dict[str, Any]]
    sheet: Picture


@dataclasses.dataclass(frozen=True)
class Strip:
    """Pictures beside each other, where there is room."""

    pictures: tuple[Picture, ...]


Part = str | Table | Strip | Examples


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it: text, tables, pictures, examples; `folded`: shown when it is clicked."""

    title: str
    parts: tuple[Part, ...]
    level: int = 2
    folded: bool = False
