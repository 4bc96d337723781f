"""The training input: sources mixed and shuffled into one global order, read by Grain as batches of rows.

The order is a pure function of the sources, their weights and the seed: row `g` of the run is the same sample
for any number of processes, threads and workers. Global batch `k` holds rows `k*B ... (k+1)*B - 1`; process
`p` of `P` reads the `p`-th of its `P` equal parts. The position in this order is therefore one number, the
same on every process, and a run can be continued on another number of processes.

Epochs. Without weights an epoch is every sample of every source once, in a new order each time. With weights
the sources are drawn from in those proportions, each reshuffled whenever it is used up; an epoch is then as
many draws as there are samples in all sources together. Epochs follow each other without a gap, and the last
batch of the last one is filled up with empty rows (segment 0, weight 0, id ""), so that no sample is lost.

Packing. With a `packing.PackingPlan`, row `g` is what that puts there: several samples of one epoch, in its own order.
A batch then has as many rows as hold `batch_size` samples on average, so that samples of fewer tokens make a smaller
batch and a faster step, not another number of steps. Empty rows fill it up to what the devices divide.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Int

from mllm_jax.data.conversations import SampleError
from mllm_jax.data.packing import PackingPlan, RowLimits
from mllm_jax.data.reading import DataError
from mllm_jax.data.rows import Row, RowEncoder, Rows, stack_rows
from mllm_jax.data.samples import Sample, Source

STATE_VERSION = 1


def make_train_iterator(
    sources: Sequence[Source],
    encoder: RowEncoder,
    *,
    batch_size: int,
    seed: int,
    epochs: int | None = 1,
    weights: Sequence[float | int] | None = None,
    packing: PackingPlan | None = None,
    row_multiple: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    num_workers: int = 0,
) -> "TrainIterator":
    """The batches of a training run, as this process sees them.

    Args:
      sources: data sets; anything with a length and `source[i] -> Sample`.
      encoder: how samples become a row.
      batch_size: samples of a batch over all processes; with `packing` on average.
      seed: of the order.
      epochs: passes over the data; None never ends.
      weights: None reads every sample once per epoch; else one positive proportion per source.
      packing: which samples share a row (`packing_plan` with the same sources, seed, epochs and weights); None for one
        sample a row.
      row_multiple: packed batches get empty rows until this (and the number of processes) divides their rows.
      process_index, process_count: which part of each batch to read, and of how many.
      num_threads: threads that make batches ahead of time; None for one per core, up to 16; 0 for none.
      num_workers: processes that do so, each with its threads (the script must then guard its code with
        `if __name__ == "__main__"`).

    Raises:
      ValueError: for an empty source, unusable weights or sizes that do not divide.
    """
    import grain  # slow to import

    _check_sources(sources, weights)
    if batch_size < 1 or (packing is None and batch_size % process_count):
        raise ValueError(f"batch_size {batch_size} does not divide over {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below process_count {process_count}")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, or None for no end; got {epochs}")

    numbers = _global_order([len(source) for source in sources], weights, seed, epochs)
    if packing is None:
        per_step = rows = batch_size
    else:
        per_step, multiple = packing.rows_holding(batch_size), math.lcm(row_multiple, process_count)
        rows = -(-per_step // multiple) * multiple
    num_rows = None if epochs is None else len(numbers if packing is None else packing)
    num_batches = None if num_rows is None else -(-num_rows // per_step)
    label_tokens = None if packing is None else packing.most_label_tokens()
    make_row = _RowMaker(_Reader(sources), encoder, numbers, packing, rows, per_step, num_rows, label_tokens)
    places = sys.maxsize if num_batches is None else num_batches * rows
    parts = grain.MapDataset.range(places).map(make_row)
    parts = parts.batch(rows // process_count, drop_remainder=True, batch_fn=stack_rows)
    order = {
        "seed": seed,
        "batch_size": batch_size,
        "weights": None if weights is None else [float(weight) for weight in weights],
        "sources": [_describe(source) for source in sources],
    }
    if packing is not None:
        order["packing"] = packing.fingerprint
    return TrainIterator(
        parts[process_index::process_count],
        order=order,
        rows=rows,
        label_tokens=label_tokens,
        num_samples=None if epochs is None else len(numbers),
        num_batches=num_batches,
        num_threads=min(16, os.cpu_count() or 1) if num_threads is None else num_threads,
        num_workers=num_workers,
    )


def packing_plan(
    sources: Sequence[Source],
    sizes: Int[np.ndarray, "N 4"],
    limits: RowLimits,
    *,
    seed: int,
    epochs: int | None = 1,
    weights: Sequence[float | int] | None = None,
) -> PackingPlan:
    """Which samples share a row in a training run.

    Args:
      sources: data sets.
      sizes: what each sample of the sources, one source after the other, needs of a row (`measure.sizes`).
      limits: of a row.
      seed, epochs, weights: see `make_train_iterator`.

    Raises:
      ValueError: for an empty source or unusable weights.
    """
    _check_sources(sources, weights)
    lengths = [len(source) for source in sources]
    draws = None if weights is None else functools.partial(_drawn, lengths, weights, seed)
    return PackingPlan(sizes, limits, seed, epochs, draws)


class TrainIterator:
    """Iterates over batches and can be stopped and continued exactly.

    Each batch is a `rows.Rows` of this process's share: NumPy arrays, the samples' ids and what was skipped.

    Attributes:
      rows: `B`, rows of a batch over all processes.
      label_tokens: supervised tokens that no row has more of; None where samples were not measured.
      num_batches: of the whole run; None without an end.
      num_samples: of the whole run, over all processes; None without an end.
      skipped: how many samples this process has left out since the iterator was made.
    """

    def __init__(
        self,
        batches: Any,  # grain.MapDataset
        *,
        order: dict[str, Any],
        rows: int,
        label_tokens: int | None,
        num_samples: int | None,
        num_batches: int | None,
        num_threads: int,
        num_workers: int,
    ):
        self.rows = rows
        self.label_tokens = label_tokens
        self.num_samples = num_samples
        self.num_batches = num_batches
        self.skipped = 0
        self._batches = batches
        self._order = order
        self._num_threads = num_threads
        self._num_workers = num_workers
        self._next_batch = 0
        self._failure: Exception | None = None
        self._iterator: Any = None

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Rows:
        if self._failure is not None:
            raise self._failure  # after an error Grain's iterator would go on with the batch behind it
        if self._iterator is None:
            self._iterator = self._start()
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            self._failure = error
            raise
        self._next_batch += 1
        self.skipped += len(batch.skipped)
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position: JSON-able, small, and the same on every process."""
        return {"version": STATE_VERSION, "next_batch": self._next_batch, "order": self._order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` returned, here or in another process or run.

        Raises:
          DataError: if the state belongs to another order (other data, seed, weights or batch size); the
            message says what differs.
        """
        version = state.get("version")
        if version != STATE_VERSION:
            raise ValueError(f"data state of version {version!r}; this code reads {STATE_VERSION}")
        for key, value in self._order.items():
            saved = state["order"].get(key)
            if saved != value:
                raise DataError(
                    f"cannot continue: the data's {key!r} was {saved!r}, now it is {value!r}; give the data and "
                    "settings of the run's beginning, or start anew in another --workdir"
                )
        self.close()
        self._next_batch = int(state["next_batch"])
        self._failure = None

    def close(self) -> None:
        """Stops the threads or workers. Iterating again starts them again, where the iteration stood."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Any:
        import grain  # slow to import

        # Beginning at a slice instead of restoring Grain's own state keeps the position independent of the
        # numbers of threads and workers.
        ahead = max(2, self._num_threads) if self._num_threads else 0
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=ahead)
        dataset = self._batches[self._next_batch :].to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its flags here; without absl.app, their defaults
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        return iter(dataset)


class _Reader:
    """Reads a sample by its number, counted over all sources one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])

    def __call__(self, number: int) -> Sample:
        source = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return self._sources[source][number - before]


@dataclasses.dataclass(frozen=True)
class _RowMaker:
    """Makes the run's rows by their places, of which every batch has `rows`; the last of them may be empty.

    Attributes:
      numbers: of the samples, in the run's order.
      packing: numbers of the samples of each row; None = one sample a row.
      rows: places of a batch.
      per_step: rows of a batch that are not empty.
      num_rows: of the run that are not empty; None without an end.
      label_tokens: supervised tokens that no row has more of, by the sizes of its samples; None = not known.
    """

    read: "_Reader"
    encoder: RowEncoder
    numbers: Any  # grain.MapDataset
    packing: PackingPlan | None
    rows: int
    per_step: int
    num_rows: int | None
    label_tokens: int | None

    def __call__(self, place: int) -> Row:
        step, row = divmod(place, self.rows)
        number = step * self.per_step + row
        if row >= self.per_step or (self.num_rows is not None and number >= self.num_rows):
            return self.encoder([])
        members = [self.numbers[number]] if self.packing is None else self.packing[number]
        made = self.encoder([self.read(each) for each in members])
        found = np.count_nonzero(made.arrays.loss_weights)
        if self.label_tokens is not None and found > self.label_tokens:  # the loss would pass over some
            problem = (
                f"the row has {found} supervised tokens, and by the stored sizes of its samples at most "
            )
            problem += f"{self.label_tokens}; delete the folder 'sizes' of the prepared data and start again"
            raise SampleError(made.id, problem)
        return made


def _global_order(
    lengths: Sequence[int], weights: Sequence[float | int] | None, seed: int, epochs: int | None
) -> Any:
    """The numbers of all samples of the run, in order, as a grain.MapDataset; see `_Reader`."""
    import grain  # slow to import

    ends = np.cumsum(lengths).tolist()
    parts = [grain.MapDataset.range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    if weights is None:
        return grain.MapDataset.concatenate(parts).shuffle(seed=_derive(seed, 0)).repeat(epochs)
    endless = [part.shuffle(seed=_derive(seed, index)).repeat() for index, part in enumerate(parts)]
    mixed = grain.MapDataset.mix(endless, list(weights))
    return mixed if epochs is None else mixed[: epochs * sum(lengths)]


def _drawn(
    lengths: Sequence[int], weights: Sequence[float | int], seed: int, epoch: int
) -> Int[np.ndarray, " N"]:
    """The numbers of an epoch's samples, in proportion to the weights; each source is used up before it repeats."""
    total, shares = sum(lengths), np.asarray(weights, float) / sum(weights)

    def before(epoch: int) -> Int[np.ndarray, " sources"]:
        counts = np.floor(epoch * total * shares).astype(np.int64)
        counts[np.argmax(shares)] += epoch * total - counts.sum()
        return counts

    numbers = []
    for source, (first, last) in enumerate(zip(before(epoch), before(epoch + 1), strict=True)):
        length, start = lengths[source], sum(lengths[:source])
        for turn in range(first // length, -(-last // length)):
            order = np.random.default_rng([0xD4A3, seed, source, turn]).permutation(length)
            numbers.append(start + order[max(first - turn * length, 0) : max(last - turn * length, 0)])
    return np.concatenate(numbers)


def _derive(seed: int, index: int) -> int:
    """Independent 32-bit seeds; Grain adds the epoch to its seed, so seeds in a row would share orders."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _check_sources(sources: Sequence[Source], weights: Sequence[float | int] | None) -> None:
    if not sources:
        raise ValueError("no data source given")
    for index, source in enumerate(sources):
        if len(source) == 0:
            raise ValueError(f"data source {index} ({source!r}) is empty")
    if weights is not None and len(weights) != len(sources):
        raise ValueError(f"{len(weights)} weights for {len(sources)} data sources")
    for index, weight in enumerate(weights or ()):
        if not (weight > 0 and np.isfinite(weight)):
            raise ValueError(f"the weight of data source {index} is {weight}; it must be positive")


def _describe(source: Source) -> dict[str, Any]:
    """What a saved position remembers of a source, to refuse another one."""
    return {"samples": len(source), "fingerprint": getattr(source, "fingerprint", None)}
