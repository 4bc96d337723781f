"""The part of prompts that several questions share (template and images), computed once; and batches on top of it."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt8

from mllm_jax.data.batch import Batch
from mllm_jax.data.layout import VisualLayout
from mllm_jax.inference.batching import (
    DEFAULT_BUCKETS,
    Chunk,
    Request,
    bucket,
    chunks,
    lay_out,
    with_images,
)
from mllm_jax.inference.prefill import images_at_once, prefill_limit, read, without_remat
from mllm_jax.models import mllm
from mllm_jax.models.decoder import Cache
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import current_row_shards

LoadImage = Callable[[Hashable, VisualLayout], UInt8[np.ndarray, "n H W 3"]]
Answer = TypeVar("Answer")
_POOL_BYTES = 512 << 20  # keys and values of prefixes that are kept at once
_REQUESTS_PER_ROW = 32  # requests looked at together, as a multiple of the batch size


@flax.struct.dataclass
class Prefixes:
    """What later tokens need of `U` prefixes of at most `P` tokens.

    Attributes:
      visual: the visual tokens, for suffixes that begin inside an image; None without images.
      k, v: of every layer.
      segments: 1, or 0 at padding.
    """

    visual: Float[Array, "U IM D"] | None
    k: Float[Array, "L U K P h"]
    v: Float[Array, "L U K P h"]
    segments: Int[Array, "U P"]


@dataclasses.dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of one batch: their suffixes, and the prefixes before them.

    Attributes:
      requests: of the first rows; the rest of the rows is empty.
      rows: the suffixes.
      prefixes: of the whole chunk.
      prefix_of: index into `prefixes`, per row.
    """

    requests: Sequence[Request]
    rows: Batch
    prefixes: Prefixes
    prefix_of: Int32[np.ndarray, " B"]

    @property
    def lengths(self) -> Int32[np.ndarray, " B"]:
        """Tokens of the suffixes; 0 for a row that only fills the batch."""
        return (self.rows.segment_ids != 0).sum(axis=1, dtype=np.int32)

    def open_cache(self, room: int) -> tuple[Float[Array, "B IM D"] | None, Cache]:
        """The rows' visual tokens, and a decode cache with their prefixes and room for `room` more columns."""
        return _open_cache(self.prefixes, self.prefix_of, room)


@functools.partial(jax.jit, static_argnums=2)
def _open_cache(prefixes: Prefixes, which: Int[Array, " B"], room: int) -> tuple[Array | None, Cache]:
    def widened(states: Array) -> Array:
        return jnp.pad(states[:, which], ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))

    segments = jnp.pad(prefixes.segments[which], ((0, 0), (0, room)))
    column = jnp.int32(prefixes.segments.shape[1])
    visual = None if prefixes.visual is None else prefixes.visual[which]
    return visual, Cache(widened(prefixes.k), widened(prefixes.v), segments, column)


@functools.partial(jax.jit, static_argnums=(0, 3))
def compute_prefixes(config: ModelConfig, params: Params, batch: Batch, limit: int) -> Prefixes:
    """Encodes images and runs the LLM over prefixes, in pieces of at most `limit` bytes (`prefill.read`)."""
    rows, length = batch.tokens.shape
    cache = mllm.empty_cache(config, rows, length)
    visual = mllm.apply(config, params, batch, method="visual_tokens")
    if length:
        nowhere = jnp.zeros((rows, 0), jnp.int32)
        _, cache = read(config, params, batch, visual, cache, nowhere, limit)
    return Prefixes(visual, cache.k, cache.v, cache.segments)


def _compute_all(config: ModelConfig, params: Params, batches: Sequence[Batch], limit: int) -> Prefixes:
    """The prefixes of several batches as one, of which no second copy is made."""
    first = compute_prefixes(config, params, batches[0], limit)
    if len(batches) == 1:
        return first
    pool = _room_for(first, len(batches))
    for index, batch in enumerate(batches):
        part = first if index == 0 else compute_prefixes(config, params, batch, limit)
        pool = _put(pool, part, index)
    return pool


def _rows_axis(path: tuple[Any, ...]) -> int:
    """The axis of a field of `Prefixes` that numbers the prefixes."""
    return 1 if path[0].name in ("k", "v") else 0


@functools.partial(jax.jit, static_argnums=1)
def _room_for(part: Prefixes, count: int) -> Prefixes:
    def zeros(path: tuple[Any, ...], leaf: Array) -> Array:
        axis = _rows_axis(path)
        return jnp.zeros((*leaf.shape[:axis], leaf.shape[axis] * count, *leaf.shape[axis + 1 :]), leaf.dtype)

    return jax.tree_util.tree_map_with_path(zeros, part)


@functools.partial(jax.jit, donate_argnums=0)
def _put(pool: Prefixes, part: Prefixes, index: Int[Array, ""]) -> Prefixes:
    def put(path: tuple[Any, ...], whole: Array, leaf: Array) -> Array:
        axis = _rows_axis(path)
        return jax.lax.dynamic_update_slice_in_dim(whole, leaf, index * leaf.shape[axis], axis)

    return jax.tree_util.tree_map_with_path(put, pool, part)


def answer_in_order(
    config: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    answer: Callable[[PromptBatch], Sequence[Answer]],
    *,
    load_image: LoadImage | None,
    batch_size: int,
    buckets: Sequence[int],
    threads: int,
    limit: int,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[Answer]:
    """Answers requests batch by batch and yields the answers in the order in which the requests come.

    Requests are read ahead in chunks (at most 32 batches, fewer where the images need much memory); in a chunk equal
    prefixes are computed once and the rest is sorted by length. The next chunk's requests are drawn and its images
    loaded by background threads while this one is answered.

    Args:
      answer: the answers to the requests of one batch, in their order.
      load_image: image key and layout -> the image's slots; called from several threads. None if no request has an
        image.
      batch_size: rows of a batch, a multiple of `current_row_shards()`.
      buckets: lengths to which what follows the last image is padded.
      threads: how many load images.
      limit: bytes that reading prompts may need besides the cache (`prefill.read`).
      on_batch: told after each batch how many requests it finished.

    Raises:
      SampleError: a prompt's visual tokens do not fit its images.
      ValueError: a request with images, and no `load_image`.
    """
    for chunk, prefixes in _chunks_with_prefixes(
        config, params, requests, load_image, batch_size, threads, limit
    ):
        answers: list[Any] = [None] * len(chunk.requests)
        for chosen, rows in chunk.suffix_batches(batch_size, buckets):
            prefix_of = np.zeros(batch_size, np.int32)
            prefix_of[: len(chosen)] = chunk.prefix_of[chosen]
            batch = PromptBatch([chunk.requests[index] for index in chosen], rows, prefixes, prefix_of)
            for index, found in zip(chosen, answer(batch), strict=True):
                answers[index] = found
            if on_batch is not None:
                on_batch(len(chosen))
        del prefixes, batch  # before the next chunk's are computed
        yield from answers


def batch_prompts(
    config: ModelConfig,
    params: Params,
    requests: Sequence[Request],
    *,
    load_image: LoadImage | None = None,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    prefill_bytes: int | None = None,
) -> PromptBatch:
    """Requests as one batch, in their order; arguments as in `answer_in_order`.

    Raises:
      SampleError, ValueError: as in `answer_in_order`; no request at all.
    """
    if not requests:
        raise ValueError("a batch needs at least one request")
    size = len(requests) + -len(requests) % current_row_shards()
    ((chunk, prefixes),) = _chunks_with_prefixes(
        without_remat(config), params, requests, load_image, size, 4, prefill_limit(prefill_bytes)
    )
    pieces = [(request.prompt, request.cut, len(request.prompt)) for request in requests]
    length = bucket(max(stop - start for _, start, stop in pieces), buckets)
    prefix_of = np.pad(chunk.prefix_of, (0, size - len(requests)))
    return PromptBatch(requests, lay_out(pieces, length, size), prefixes, prefix_of)


def _chunks_with_prefixes(
    config: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    load_image: LoadImage | None,
    batch_size: int,
    threads: int,
    limit: int,
) -> Iterator[tuple[Chunk, Prefixes]]:
    rule = config.visual_layout
    per_prefix = 2 * config.llm.depth * config.llm.kv_heads * config.llm.head_width
    per_prefix *= jnp.dtype(config.dtype).itemsize * (rule.most_tokens + 32)
    max_prefixes = max(batch_size, _POOL_BYTES // per_prefix)

    def fitting_requests() -> Iterator[Request]:
        for request in requests:
            request.check(rule.slot)
            if request.images and load_image is None:
                raise ValueError(f"request {request.id!r} has images, but no load_image was given")
            yield request

    source = chunks(fitting_requests(), batch_size * _REQUESTS_PER_ROW, max_prefixes)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads) as loaders:
        shards = current_row_shards()  # the current mesh is not known to other threads

        def read_ahead() -> tuple[Chunk, list[Batch]] | None:
            chunk = next(source, None)
            if chunk is None:
                return None
            wanted = [list(zip(r.images, r.prompt.layouts, strict=True)) for r in chunk.prefixes]
            needed = dict.fromkeys(one for own in wanted for one in own)
            futures: dict[Hashable, Future] = {one: loaders.submit(load_image, *one) for one in needed}
            images = [[futures[one].result() for one in own] for own in wanted]
            return chunk, list(_prefix_batches(config, chunk, images, batch_size, shards, limit))

        upcoming = reader.submit(read_ahead)
        while (item := upcoming.result()) is not None:
            upcoming = reader.submit(read_ahead)
            # The prefixes are not kept in a variable here, so that whoever takes them can let them go.
            yield item[0], _compute_all(config, params, item[1], limit)


def _prefix_batches(
    config: ModelConfig,
    chunk: Chunk,
    images: list[list[UInt8[np.ndarray, "_ H W 3"]]],
    batch_size: int,
    shards: int,
    limit: int,
) -> Iterator[Batch]:
    """The prefixes of a chunk as batches that the vision encoder can take within `limit` bytes."""
    size = 1 if len(chunk.prefixes) == 1 else batch_size
    if slots := chunk.image_slots(config.visual_layout.most_slots):
        size = min(size, shards * max(1, images_at_once(config, limit) // slots))
    size += -size % shards
    for start in range(0, len(chunk.prefixes), size):
        pieces = [(request.prompt, 0, request.cut) for request in chunk.prefixes[start : start + size]]
        rows = lay_out(pieces, chunk.prefix_length, size)
        if slots:
            prompts, own = [prompt for prompt, _, _ in pieces], images[start : start + size]
            rows = with_images(rows, prompts, own, slots, config.visual_layout.slot)
        yield rows
