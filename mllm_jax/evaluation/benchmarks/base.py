"""What a benchmark is to the rest of the library: a name, a unit and one function from files to scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One row of the table in `mllm_jax.evaluation.benchmarks`.

    Attributes:
        name: exact name on the command line.
        unit: of the headline score: `fraction`, `percent` or `points`.
        score_files: `(predictions, annotations, **options) -> result` (see `predictions.score_result`).
        predictions: what the prediction file looks like, one sentence for the help text.
        annotations: the same for the annotations; empty if the predictions carry the answers.
        options: names of the keyword options that `score_files` takes.
        official: whose rule is followed.
    """

    name: str
    unit: str
    score_files: Callable[..., dict[str, Any]]
    predictions: str
    annotations: str
    official: str
    options: tuple[str, ...] = ()

    def score(self, predictions: Path, annotations: Path | None = None, **options: Any) -> dict[str, Any]:
        """Scores a prediction file.

        Raises:
            ValueError: an option that this benchmark does not have, or annotations that it needs are missing.
            PredictionError: a file that cannot be read at all.
        """
        for key in options:
            if key not in self.options:
                raise ValueError(f"{self.name}: no option {key!r}; it has {list(self.options)}")
        if self.annotations and annotations is None:
            raise ValueError(f"{self.name}: --annotations is needed: {self.annotations}")
        return self.score_files(
            Path(predictions), None if annotations is None else Path(annotations), **options
        )


def ratio(right: float | int, n: float | int, scale: float | int = 1.0) -> float:
    """`right / n * scale`, 0 for n = 0 (an empty part of a benchmark has no right answers)."""
    return float(right / n * scale) if n else 0.0


class Tally:
    """Right answers and questions per name, in the order in which the names came.

    Example:
        >>> tally = Tally()
        >>> tally.add("color", True); tally.add("color", False)
        >>> tally.accuracy()
        {'color': 0.5}
    """

    def __init__(self) -> None:
        self.cells: dict[str, list[int]] = {}

    def add(self, name: str, right: bool) -> None:
        cell = self.cells.setdefault(name, [0, 0])
        cell[0] += bool(right)
        cell[1] += 1

    @property
    def right(self) -> int:
        return sum(right for right, _ in self.cells.values())

    @property
    def n(self) -> int:
        return sum(n for _, n in self.cells.values())

    def accuracy(self, scale: float | int = 1.0) -> dict[str, float]:
        """Name -> accuracy times `scale`."""
        return {name: ratio(right, n, scale) for name, (right, n) in self.cells.items()}

    def counts(self) -> dict[str, list[int]]:
        """Name -> [right, questions]."""
        return {name: list(cell) for name, cell in self.cells.items()}
