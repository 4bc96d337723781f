"""The part of prompts that several questions share (template and pictures), computed once and kept."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mllm_jax.data.batch import Batch
from mllm_jax.inference.batching import Chunk, Request, chunks, prefix_rows, stack_images
from mllm_jax.models import mllm
from mllm_jax.models.decoder import Cache
from mllm_jax.models.mllm import MLLM, ModelConfig, Params
from mllm_jax.parallel.mesh import ROWS

LoadImage = Callable[[Hashable], np.ndarray]
_POOL_BYTES = 512 << 20  # keys and values of prefixes that are kept at once
_REQUESTS_PER_ROW = 32  # requests looked at together, as a multiple of the batch size


@flax.struct.dataclass
class Prefixes:
    """What later tokens need of `U` prefixes of at most `P` tokens.

    Attributes:
      visual: the visual tokens, for suffixes that begin inside a picture.
      k, v: of every layer.
      segments: 1, or 0 at padding.
    """

    visual: Float[Array, "U IM D"]
    k: Float[Array, "L U P K h"]
    v: Float[Array, "L U P K h"]
    segments: Int[Array, "U P"]

    def cache(self, length: int) -> Cache:
        """A decode cache with these prefixes and room for `length` more columns."""
        layers, rows, columns, heads, width = self.k.shape
        room = jnp.zeros((layers, rows, length, heads, width), self.k.dtype)
        return Cache(
            jnp.concatenate([self.k, room], axis=2),
            jnp.concatenate([self.v, room], axis=2),
            jnp.pad(self.segments, ((0, 0), (0, length))),
            jnp.int32(columns),
        )


def without_remat(config: ModelConfig) -> ModelConfig:
    """The same computation without rematerialisation, which only slows compiling down when nothing is learned."""
    return dataclasses.replace(config, remat="none", vision_remat="none")


def run_suffix(module: MLLM, rows: Batch, visual: Array, cache: Cache) -> tuple[Array, Cache]:
    """Hidden states of suffixes behind the prefixes in the cache, and the cache with them."""
    embeddings = module.embed(rows.tokens, rows.visual_index, visual)
    return module.llm(embeddings, rows.positions, rows.segment_ids, cache)


def _run_prefix(module: MLLM, batch: Batch, cache: Cache) -> tuple[Array, Cache]:
    visual = module.visual_tokens(batch)
    return visual, run_suffix(module, batch, visual, cache)[1]


@functools.partial(jax.jit, static_argnums=0)
def compute_prefixes(config: ModelConfig, params: Params, batch: Batch) -> Prefixes:
    """Encodes pictures and runs the LLM over prefixes; `batch` is of the batch contract."""
    rows, length = batch.tokens.shape
    if length == 0:  # text only: nothing is shared
        cache = mllm.empty_cache(config, rows, 0)
        width = (rows, config.visual_layout.slot.num_tokens, config.llm.width)
        return Prefixes(jnp.zeros(width, cache.k.dtype), cache.k, cache.v, cache.segments)
    cache = mllm.empty_cache(config, rows, length)
    visual, cache = mllm.apply(config, params, batch, cache, method=_run_prefix)
    return Prefixes(visual, cache.k, cache.v, cache.segments)


@jax.jit
def select(pool: Prefixes, which: Int[Array, " B"]) -> Prefixes:
    """The prefixes of a batch's rows."""
    return Prefixes(pool.visual[which], pool.k[:, which], pool.v[:, which], pool.segments[which])


@jax.jit
def _join(pools: list[Prefixes]) -> Prefixes:
    return Prefixes(
        jnp.concatenate([p.visual for p in pools]),
        jnp.concatenate([p.k for p in pools], axis=1),
        jnp.concatenate([p.v for p in pools], axis=1),
        jnp.concatenate([p.segments for p in pools]),
    )


def row_shards() -> int:
    """Devices over which the current mesh splits the rows of a batch (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def everywhere(tree: Any) -> Any:
    """Makes arrays inside a jitted function whole on every device, so that every process can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def prefix_pools(
    config: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    *,
    load_image: LoadImage | None,
    batch_size: int,
    threads: int,
) -> Iterator[tuple[Chunk, Prefixes]]:
    """Cuts requests into chunks and computes the prefixes of each.

    The next chunk's requests are drawn and its pictures loaded by background threads while the caller works
    on the present one.

    Args:
      load_image: picture key -> uint8[S, S, 3]; called from several threads. None if no request has one.
      batch_size: prefixes computed at once, a multiple of `row_shards()`; one alone is not padded to it.
      threads: how many load pictures.
    """
    per_prefix = 2 * config.llm.depth * config.llm.kv_heads * config.llm.head_width
    per_prefix *= jnp.dtype(config.dtype).itemsize * (config.visual_layout.slot.num_tokens + 32)
    max_prefixes = max(batch_size, _POOL_BYTES // per_prefix)

    def checked() -> Iterator[Request]:
        for request in requests:
            request.check(config.visual_layout.slot)
            if request.images and load_image is None:
                raise ValueError(f"request {request.id!r} has pictures, but no load_image was given")
            yield request

    source = chunks(checked(), batch_size * _REQUESTS_PER_ROW, max_prefixes)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(threads) as loaders:
        shards = row_shards()  # the current mesh is not known to other threads

        def read() -> tuple[Chunk, list[Batch]] | None:
            chunk = next(source, None)
            if chunk is None:
                return None
            needed = dict.fromkeys(key for request in chunk.prefixes for key in request.images)
            futures: dict[Hashable, Future] = {key: loaders.submit(load_image, key) for key in needed}
            pictures = [[futures[key].result() for key in request.images] for request in chunk.prefixes]
            return chunk, list(_prefix_batches(config, chunk, pictures, batch_size, shards))

        upcoming = reader.submit(read)
        while (item := upcoming.result()) is not None:
            upcoming = reader.submit(read)
            chunk, batches = item
            parts = [compute_prefixes(config, params, batch) for batch in batches]
            yield chunk, parts[0] if len(parts) == 1 else _join(parts)


def _prefix_batches(
    config: ModelConfig, chunk: Chunk, pictures: list[list[np.ndarray]], batch_size: int, shards: int
) -> Iterator[Batch]:
    for start in range(0, len(chunk.prefixes), batch_size):
        some = chunk.prefixes[start : start + batch_size]
        size = shards if len(chunk.prefixes) == 1 else batch_size
        images, mask = stack_images(
            pictures[start : start + batch_size], size, chunk.image_slots, config.image_size
        )
        yield prefix_rows(some, chunk.prefix_length, size).replace(images=images, image_mask=mask)
