"""Packing: which samples share a row, as a pure function of their sizes, the seed and the epoch.

A row has room for so many tokens, image slots, supervised tokens and samples, all limited together. The samples of an
epoch come in their shuffled order and are packed window by window: a row begins with the longest sample that is left
and takes those that fill it best; rows that stay far from full give their samples back to the next window. Nothing
depends on what was read before, so any row of the run can be computed at once, by every process alike: the position
in the data stays one number.
"""

import bisect
import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

PLAN_VERSION = 1  # raise when the same sizes are packed otherwise: runs under way then refuse to resume
WINDOW = (
    1024  # samples packed together: more fill rows better, fewer keep the order closer to the shuffled one
)
FULL = 0.98  # rows of a window with a smaller share of their tokens in use are opened again in the next one

RESOURCES = ("tokens", "image slots", "supervised tokens", "samples")


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What a row has room for.

    Attributes:
      tokens: `T`, visual tokens included.
      image_slots: `I`.
      label_tokens: supervised tokens.
      samples: segments; one row per sample where it is 1.
    """

    tokens: int
    image_slots: int
    label_tokens: int
    samples: int

    @property
    def array(self) -> Int[np.ndarray, " 4"]:
        """The limits in the order of `RESOURCES`."""
        return np.asarray([self.tokens, self.image_slots, self.label_tokens, self.samples], np.int64)


def pack(sizes: Int[np.ndarray, "N 4"], limits: RowLimits, rng: np.random.Generator) -> list[list[int]]:
    """Rows of sample numbers; each sample is in exactly one row.

    Args:
      sizes: what each sample needs of each of `RESOURCES`, in the order in which the samples come. What a row cannot
        hold counts as a whole row: such a sample is left out, or an error, when its row is made.
      limits: of a row.
      rng: draws the order of the rows of a window, which are made longest sample first.

    Example:
      >>> sizes = np.array([[7, 1, 2, 1], [5, 0, 1, 1], [3, 0, 1, 1]])
      >>> pack(sizes, RowLimits(10, 2, 8, 4), np.random.default_rng(0))
      [[0, 2], [1]]
    """
    most = limits.array
    sizes = np.minimum(sizes, most)
    rows: list[list[int]] = []
    waiting: list[int] = []
    for start in range(0, len(sizes), WINDOW):
        stop = min(start + WINDOW, len(sizes))
        pool = np.concatenate([np.asarray(waiting, np.int64), np.arange(start, stop)])
        packed = [pool[row] for row in _fill_rows(sizes[pool], most)]
        used = np.asarray([sizes[row, 0].sum() for row in packed])
        reopened = np.zeros(len(packed), bool)
        if stop < len(sizes):
            emptiest = np.argsort(used, kind="stable")
            carried = np.cumsum([len(packed[i]) for i in emptiest]) <= WINDOW // 2
            reopened[emptiest] = carried & (used[emptiest] < FULL * limits.tokens)
        waiting = sorted(int(sample) for i in np.flatnonzero(reopened) for sample in packed[i])
        rows += [sorted(packed[i].tolist()) for i in rng.permutation(np.flatnonzero(~reopened))]
    return rows


def _fill_rows(sizes: Int[np.ndarray, "P 4"], limits: Int[np.ndarray, " 4"]) -> list[list[int]]:
    """Rows one after the other: the longest sample that is left, then what fills the rest of the row best."""
    left = np.argsort(-sizes[:, 0], kind="stable")  # longest first
    rows = []
    while len(left):
        row, free, left = [int(left[0])], limits - sizes[left[0]], left[1:]
        while len(left):
            chosen = _best_fit(sizes[left], free)
            if not len(chosen):
                break
            row += left[chosen].tolist()
            free = free - sizes[left[chosen]].sum(axis=0)
            left = np.delete(left, chosen)
        rows.append(row)
    return rows


def _best_fit(sizes: Int[np.ndarray, "L 4"], free: Int[np.ndarray, " 4"]) -> Int[np.ndarray, " n"]:
    """Which one or two samples, the longest of which come first, leave the fewest tokens of `free`; none may fit."""
    fits = np.flatnonzero((sizes <= free).all(axis=1))
    if not len(fits):
        return fits
    tokens = sizes[fits, 0]
    if free[0] > 4 * tokens[0]:  # still far from full: no search needed
        return fits[:1]
    # The best partner of each is the longest that still fits beside it. Lengths fall, so they are searched reversed.
    partner = len(fits) - np.searchsorted(tokens[::-1], free[0] - tokens, side="right")
    first = np.arange(len(fits))
    partner = np.maximum(partner, first + 1)  # shorter than the first: each pair once
    there = partner < len(fits)
    first, partner = first[there], partner[there]
    pairs = sizes[fits[first]] + sizes[fits[partner]]
    allowed = (pairs <= free).all(axis=1)
    if allowed.any():
        best = int(np.argmax(np.where(allowed, pairs[:, 0], -1)))
        if pairs[best, 0] > tokens[0]:
            return fits[[first[best], partner[best]]]
    return fits[:1]


class PackingPlan:
    """The rows of a run: `plan[g]` is the g-th row's samples, for any number of epochs.

    Args:
      samples: places of an epoch in the training data order.
      order: place in the run -> number of the sample, in the order in which `sizes` has them; epoch `e` is the places
        from `e * samples` on.
      sizes: int[samples, 4], what each sample needs of each of `RESOURCES`.
      limits: of a row.
      seed: of the order of the rows.
      epochs: None = without end.
    """

    def __init__(
        self,
        samples: int,
        order: Callable[[int], int],
        sizes: Int[np.ndarray, "N 4"],
        limits: RowLimits,
        seed: int,
        epochs: int | None,
    ):
        self._samples, self._order, self._sizes = samples, order, sizes
        self._limits, self._seed, self._epochs = limits, seed, epochs
        self._ends: list[int] = []  # rows of the run up to the end of each epoch planned so far
        # Where one epoch ends and the next begins, threads that read ahead need both.
        self._kept: dict[int, list[list[int]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        if self._epochs is None:
            return sys.maxsize
        while len(self._ends) < self._epochs:
            self._plan(len(self._ends))
        return self._ends[-1]

    def __getitem__(self, row: int) -> list[int]:
        """Places in the run of the samples that share row `row`, ascending.

        Raises:
          IndexError: the run has fewer rows.
        """
        with self._lock:  # several threads make batches
            return self._row(row)

    def rows_holding(self, samples: int) -> int:
        """How many rows hold `samples` samples on average, at least 1; by the run's first epoch."""
        with self._lock:
            rows = len(self._rows(0))
        return max(1, round(samples * rows / self._samples))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _row(self, row: int) -> list[int]:
        while (not self._ends or row >= self._ends[-1]) and len(self._ends) != self._epochs:
            self._plan(len(self._ends))
        epoch = bisect.bisect_right(self._ends, row)
        if row < 0 or epoch == len(self._ends):
            raise IndexError(f"row {row} of a plan of {self._ends[-1]} rows")
        first = self._ends[epoch - 1] if epoch else 0
        return self._rows(epoch)[row - first]

    def _rows(self, epoch: int) -> list[list[int]]:
        return self._kept[epoch] if epoch in self._kept else self._plan(epoch)

    def _plan(self, epoch: int) -> list[list[int]]:
        begin = epoch * self._samples
        numbers = np.fromiter((self._order(begin + i) for i in range(self._samples)), np.int64, self._samples)
        rng = np.random.default_rng([0x9ACC, self._seed, epoch])
        rows = [[begin + i for i in row] for row in pack(self._sizes[numbers], self._limits, rng)]
        if epoch == len(self._ends):
            self._ends.append((self._ends[-1] if self._ends else 0) + len(rows))
        self._kept = {kept: self._kept[kept] for kept in (epoch - 1, epoch + 1) if kept in self._kept}
        self._kept[epoch] = rows
        return rows
