"""What a report consists of, before it is dressed as HTML or Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row. `strong` are the indices of rows that stand out."""

    kind: ClassVar[str] = "table"
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()

    def turned(self) -> "Table":
        """Rows as columns."""
        first, *rest = zip(self.head, *self.rows, strict=True)
        return Table(first, tuple(rest))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG in the report's folder."""

    file: str
    description: str


@dataclasses.dataclass(frozen=True)
class Figures:
    """Figures beside each other, where there is room."""

    kind: ClassVar[str] = "figures"
    figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Example answers and, for Markdown, the sheet with the same."""

    kind: ClassVar[str] = "examples"
    items: Sequence[dict[str, Any]]
    sheet: Figure

    @property
    def figures(self) -> tuple[Figure, ...]:
        """The sheet."""
        return (self.sheet,)


Part = str | Table | Figures | Examples


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it: text, tables, figures, examples; `folded`: shown when it is clicked."""

    title: str
    parts: tuple[Part, ...]
    level: int = 2
    folded: bool = False
