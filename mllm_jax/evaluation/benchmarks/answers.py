"""Stored answers beside their annotations, what they earn, and sums over them."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from mllm_jax.evaluation.predictions import take


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
      notes: what further figures need.
    """

    id: Hashable
    row: Mapping[str, Any]
    item: Mapping[str, Any]
    text: str
    where: str
    credit: float | int = 0
    parsed: bool = True
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def value(self, *names: str) -> Any:
        """The annotation's field under the first of several names that is there.

        Raises:
          PredictionError: none is.
        """
        return take(self.item, names, self.where)


def ratio(right: float | int, n: float | int, scale: float | int = 1.0) -> float:
    """`right / n * scale`, 0 for n = 0 (an empty part of a benchmark has no right answers)."""
    return float(right / n * scale) if n else 0.0


def earned(answers: Iterable[Answer]) -> float | int:
    """The sum of what answers earn."""
    return sum(answer.credit for answer in answers)


def unread(answers: Iterable[Answer]) -> int:
    """How many answers no rule could read."""
    return sum(not answer.parsed for answer in answers)


def tally(
    answers: Iterable[Answer], name_of: Callable[[Answer], str | None], note: str = ""
) -> dict[str, list[Any]]:
    """Part -> [what its answers earn, how many they are], parts in the order in which they come.

    Args:
      name_of: an answer's part; None leaves it out.
      note: adds up this note of the answers instead of their credit.
    """
    cells: dict[str, list[Any]] = {}
    for answer in answers:
        if (name := name_of(answer)) is not None:
            cell = cells.setdefault(name, [0, 0])
            cell[0] += answer.notes[note] if note else answer.credit
            cell[1] += 1
    return cells


def rates(cells: Mapping[str, Sequence[Any]], scale: float | int = 1.0) -> dict[str, float]:
    """Part -> what its answers earn on average, times `scale`."""
    return {name: ratio(right, n, scale) for name, (right, n) in cells.items()}
