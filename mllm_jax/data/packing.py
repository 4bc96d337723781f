"""Packing: which samples share a row, as a pure function of their sizes, the seed and the epoch.

A row has room for so many tokens, image slots, supervised tokens and samples, all limited together. Which sizes stand
together in a row is decided once, from how often each size occurs: a row begins with the largest that is left and takes
those that fill it best, and is repeated for as long as there are samples of these sizes. An epoch then deals the
samples of each size out anew among the places for that size, and shuffles the rows. So all epochs have as many rows,
and none is planned before it is reached. Nothing depends on what was read before: any row of the run can be computed at
once, by every process alike, and the position in the data stays one number.
"""

import bisect
import dataclasses
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

PLAN_VERSION = 2  # raise when the same sizes are packed otherwise: runs under way then refuse to resume
KINDS = 4096  # sizes that are told apart: with more, tokens are rounded up until there are no more

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


def by_text(
    sizes: Int[np.ndarray, "N 4"], limits: RowLimits, slot_tokens: int
) -> tuple[Int[np.ndarray, "N 4"], RowLimits]:
    """Sizes and limits without the visual tokens, for which a row keeps room in each of its image slots.

    Rows that are packed by these hold the same samples whatever `slot_tokens` is, as long as a row has room for the
    same text.

    Args:
      sizes: what each sample needs of each of `RESOURCES`.
      limits: of a row.
      slot_tokens: visual tokens of an image slot.

    Raises:
      ValueError: the visual tokens of all slots leave no room for text.
    """
    text = limits.tokens - limits.image_slots * slot_tokens
    if text < 1:
        raise ValueError(
            f"{limits.image_slots} image slots of {slot_tokens} visual tokens leave no room for text in rows of "
            f"{limits.tokens} tokens"
        )
    sizes = sizes.copy()
    sizes[:, 0] -= sizes[:, 1] * slot_tokens
    return sizes, dataclasses.replace(limits, tokens=text)


class Layout(NamedTuple):
    """Which places of a list of samples, sorted by kind of size, share a row.

    Attributes:
      kinds: of each sample.
      places: row after row.
      ends: of each row in `places`.
    """

    kinds: Int[np.ndarray, " N"]
    places: Int[np.ndarray, " N"]
    ends: Int[np.ndarray, " R"]


def lay_out(sizes: Int[np.ndarray, "N 4"], limits: RowLimits) -> Layout:
    """The make-up of the rows of an epoch.

    Args:
      sizes: what each sample needs of each of `RESOURCES`. What a row cannot hold counts as a whole row.
      limits: of a row.
    """
    needs, kinds = _kinds(np.minimum(sizes, limits.array), limits.array)
    left = np.bincount(kinds, minlength=len(needs))
    begin = np.cumsum(left) - left  # the next place of each kind
    places, lengths = [], []
    for row, repeats in _fill_rows(needs, left, limits.array):
        columns = []
        for kind, count in row.items():
            columns.append(begin[kind] + np.arange(repeats * count).reshape(repeats, count))
            begin[kind] += repeats * count
        rows = np.concatenate(columns, axis=1)
        places.append(rows.ravel())
        lengths.append(np.full(repeats, rows.shape[1]))
    return Layout(kinds, np.concatenate(places), np.cumsum(np.concatenate(lengths)))


def _kinds(
    sizes: Int[np.ndarray, "N 4"], most: Int[np.ndarray, " 4"]
) -> tuple[Int[np.ndarray, "K 4"], Int[np.ndarray, " N"]]:
    """What counts as one size, the longest first, and which of these each sample has."""
    sizes = sizes.astype(np.int64)
    if most[2] >= most[0] and (sizes[:, 2] <= sizes[:, 0]).all():
        sizes[:, 2] = 0  # supervised tokens run out no sooner than tokens
    step = 1
    while True:
        rounded = np.minimum(-(-sizes // [step, 1, step, 1]) * [step, 1, step, 1], most)
        key = (rounded[:, 0] * (most[1] + 1) + rounded[:, 1]) * (most[2] + 1) + rounded[:, 2]
        _, first, kinds = np.unique(-key, return_index=True, return_inverse=True)
        if len(first) <= KINDS or step >= most.max():
            return rounded[first], kinds
        step *= 2


def _fill_rows(
    needs: Int[np.ndarray, "K 4"], left: Int[np.ndarray, " K"], limits: Int[np.ndarray, " 4"]
) -> Iterator[tuple[dict[int, int], int]]:
    """Rows as numbers of samples by kind, and how often each is repeated; they use up `left` samples of each kind."""
    left = left.copy()
    kinds = np.flatnonzero(left)
    while len(kinds):
        row: dict[int, int] = {}
        free, here, spare = limits, needs[kinds], left[kinds]
        chosen = np.array([0])  # the longest
        while len(chosen):
            for at in chosen:
                row[int(kinds[at])] = row.get(int(kinds[at]), 0) + 1
                free = free - here[at]
                spare[at] -= 1
            chosen = _best_fit(here, spare, free)
        members, counts = list(row), np.array(list(row.values()))
        repeats = int((left[members] // counts).min())
        yield row, repeats
        left[members] -= repeats * counts
        kinds = kinds[left[kinds] > 0]


def _best_fit(
    needs: Int[np.ndarray, "K 4"], spare: Int[np.ndarray, " K"], free: Int[np.ndarray, " 4"]
) -> Int[np.ndarray, " n"]:
    """Which one or two kinds, the longest of which come first, leave the fewest tokens of `free`; none may fit."""
    fits = np.flatnonzero((needs <= free).all(axis=1) & (spare > 0))
    if not len(fits):
        return fits
    tokens = needs[fits, 0]
    if free[0] > 4 * tokens[0]:  # still far from full: no search needed
        return fits[:1]
    # The best partner of each is the longest that still fits beside it. Lengths fall, so they are searched reversed.
    partner = len(fits) - np.searchsorted(tokens[::-1], free[0] - tokens, side="right")
    first = np.arange(len(fits))
    partner = np.maximum(partner, first + (spare[fits] < 2))  # no longer than the first: each pair once
    there = partner < len(fits)
    first, partner = first[there], partner[there]
    pairs = needs[fits[first]] + needs[fits[partner]]
    allowed = (pairs <= free).all(axis=1)
    if allowed.any():
        used = np.where(allowed, pairs[:, 0], -1)
        best = len(used) - 1 - int(np.argmax(used[::-1]))  # the most even pair: short ones fill other rows
        if pairs[best, 0] > tokens[0]:
            return fits[[first[best], partner[best]]]
    return fits[:1]


def pack(sizes: Int[np.ndarray, "N 4"], limits: RowLimits, rng: np.random.Generator) -> list[list[int]]:
    """Rows of sample numbers; each sample is in exactly one row.

    Args:
      sizes: what each sample needs of each of `RESOURCES`. What a row cannot hold counts as a whole row: such a sample
        is left out, or an error, when its row is made.
      limits: of a row.
      rng: deals samples of one size out, and draws the order of the rows.

    Example:
      >>> sizes = np.array([[7, 1, 2, 1], [5, 0, 1, 1], [3, 0, 1, 1]])
      >>> sorted(pack(sizes, RowLimits(10, 2, 8, 4), np.random.default_rng(0)))
      [[0, 2], [1]]
    """
    return list(_Epoch(lay_out(sizes, limits), np.arange(len(sizes)), rng))


class _Epoch:
    """The rows of an epoch: a layout, who stands at its places, and the rows' order.

    Args:
      numbers: of the samples, in the order of the layout's `kinds`.
    """

    def __init__(self, layout: Layout, numbers: Int[np.ndarray, " N"], rng: np.random.Generator):
        dealt = rng.permutation(len(numbers))
        dealt = dealt[np.argsort(layout.kinds[dealt], kind="stable")]
        self._samples = numbers[dealt[layout.places]]
        self._ends = layout.ends
        self._order = rng.permutation(len(layout.ends))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, row: int) -> list[int]:
        which = self._order[row]  # IndexError behind the last
        begin = self._ends[which - 1] if which else 0
        return sorted(self._samples[begin : self._ends[which]].tolist())


class PackingPlan:
    """The rows of a run: `plan[g]` is the numbers of the g-th row's samples, for any number of epochs.

    Args:
      sizes: what each sample needs of each of `RESOURCES`.
      limits: of a row.
      seed: of the order.
      epochs: None = without end.
      draws: epoch -> the numbers of its samples, where they are drawn in proportions and differ, so that each epoch
        needs a layout of its own. None for every sample once an epoch.
    """

    def __init__(
        self,
        sizes: Int[np.ndarray, "N 4"],
        limits: RowLimits,
        seed: int,
        epochs: int | None,
        draws: Callable[[int], Int[np.ndarray, " N"]] | None = None,
    ):
        self._sizes = sizes
        self._limits, self._seed, self._epochs, self._draws = limits, seed, epochs, draws
        self._common = lay_out(sizes, limits) if draws is None else None
        self._ends: list[int] = []  # rows of the run up to the end of each epoch asked for so far
        # Where one epoch ends and the next begins, threads that read ahead need both.
        self._kept: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """A digest of what decides the rows, but for the order's seed and what is drawn."""
        decides = (PLAN_VERSION, self._sizes.tobytes(), self._limits.array.tobytes())
        return hashlib.sha256(repr(decides).encode()).hexdigest()

    def __len__(self) -> int:
        if self._epochs is None:
            return sys.maxsize
        with self._lock:
            while len(self._ends) < self._epochs:
                self._extend()
            return self._ends[-1]

    def __getitem__(self, row: int) -> list[int]:
        """The samples that share row `row`, ascending.

        Raises:
          IndexError: the run has fewer rows.
        """
        with self._lock:  # several threads make batches
            while (not self._ends or row >= self._ends[-1]) and len(self._ends) != self._epochs:
                self._extend()
            epoch = bisect.bisect_right(self._ends, row)
            if row < 0 or epoch == len(self._ends):
                raise IndexError(f"row {row} of a plan of {self._ends[-1]} rows")
            return self._planned(epoch)[row - (self._ends[epoch - 1] if epoch else 0)]

    def rows_holding(self, samples: int) -> int:
        """How many rows hold `samples` samples on average, at least 1; by the run's first epoch."""
        with self._lock:
            if not self._ends:
                self._extend()
        return max(1, round(samples * self._ends[0] / len(self._sizes)))

    def most_label_tokens(self) -> int:
        """Supervised tokens that no row of any epoch has more of; known below the limit where every epoch has the same
        samples."""
        limit = self._limits.label_tokens
        if self._common is None:
            return limit
        kinds, places, ends = self._common
        most = np.zeros(
            kinds.max() + 1, np.int64
        )  # of the samples of each kind, which are dealt anew every epoch
        np.maximum.at(most, kinds, np.minimum(self._sizes[:, 2], limit))
        rows = np.add.reduceat(most[np.sort(kinds)[places]], np.concatenate([[0], ends[:-1]]))
        return int(min(limit, rows.max()))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _extend(self) -> None:
        epoch = len(self._ends)
        rows = len(self._common.ends) if self._common else len(self._planned(epoch))
        self._ends.append((self._ends[-1] if epoch else 0) + rows)

    def _planned(self, epoch: int) -> _Epoch:
        if epoch not in self._kept:
            rng = np.random.default_rng([0x9ACC, self._seed, epoch])
            numbers = np.arange(len(self._sizes)) if self._draws is None else self._draws(epoch)
            layout = self._common or lay_out(self._sizes[numbers], self._limits)
            self._kept = {near: self._kept[near] for near in (epoch - 1, epoch + 1) if near in self._kept}
            self._kept[epoch] = _Epoch(layout, numbers, rng)
        return self._kept[epoch]
