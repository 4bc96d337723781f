"""Stored answers beside their annotations, what they earn, and sums over them."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mllm_jax.evaluation.predictions import Row, take


@dataclasses.dataclass(eq=False)
class Answer:
    """A stored answer beside its annotation, and, once graded, what it earns.

    Attributes:
      id: the question's.
      row: the row of the answer file.
      item: the annotation; the row itself where the answer file holds the right answers too.
      text: the answer.
      where: file and question, for messages.
      credit: what the score counts for it, from 0 (False) to 1 (True).
      parsed: False if no rule could read it; at first, whether it holds anything.
      part: the sub-task that it counts in; None for none.
      notes: what further figures need.
    """

    id: Hashable
    row: Row
    item: Row
    text: str
    where: str
    credit: float | int = 0
    parsed: bool = True
    part: str | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def value(self, *names: str) -> Any:
        """The annotation's field under the first of several names that is there.

        Raises:
          PredictionError: none is.
        """
        return take(self.item, names, self.where)


class Answers(list[Answer]):
    """The answers of a file, in the order in which they are added up.

    A `note` adds up this note of the answers instead of their credit.
    """

    @property
    def earned(self) -> float | int:
        """The sum of what they earn."""
        return self.total()

    @property
    def unread(self) -> int:
        """How many no rule could read."""
        return sum(not answer.parsed for answer in self)

    def values(self, note: str = "") -> list[Any]:
        """What they earn, or a note, one by one."""
        return [answer.notes[note] if note else answer.credit for answer in self]

    def total(self, note: str = "") -> float | int:
        """The sum of what they earn, or of a note."""
        return sum(self.values(note))

    def mean(self, note: str = "", scale: float | int = 1.0) -> float:
        """The mean of the same, times `scale`."""
        return ratio(self.total(note), len(self), scale)

    def parts(self, by: str = "") -> dict[Any, Answers]:
        """Part (or what the note `by` says) -> its answers, in the order in which parts come; None is left out."""
        found: dict[Any, Answers] = {}
        for answer in self:
            if (name := answer.notes.get(by) if by else answer.part) is not None:
                found.setdefault(name, Answers()).append(answer)
        return found

    def circular(self, by: str) -> Answers:
        """One answer per question (its number is the note `by`): the first one's, right if all of its answers are."""
        return Answers(
            dataclasses.replace(min(turns, key=lambda answer: answer.id), credit=all(turns.values()))
            for turns in self.parts(by).values()
        )

    def cells(self, by: str = "") -> dict[Any, list[Any]]:
        """Part -> [what its answers earn, how many they are]; see `parts`."""
        # Added one after the other: `sum` rounds in another way from Python 3.12 on. From 0, so that one True counts 1.
        return {
            name: [functools.reduce(operator.add, part.values(), 0), len(part)]
            for name, part in self.parts(by).items()
        }

    def rates(self, by: str = "", scale: float | int = 1.0) -> dict[Any, float]:
        """Part -> what its answers earn on average, times `scale`; see `parts`."""
        return rates(self.cells(by), scale)


def ratio(right: float | int, n: float | int, scale: float | int = 1.0) -> float:
    """`right / n * scale`, 0 for n = 0 (an empty part of a benchmark has no right answers)."""
    return float(right / n * scale) if n else 0.0


def rates(cells: Mapping[Any, Sequence[Any]], scale: float | int = 1.0) -> dict[Any, float]:
    """Part -> right / n * `scale` of [right, n]."""
    return {name: ratio(right, n, scale) for name, (right, n) in cells.items()}
