"""Reading prompts into a decode cache in pieces, so that memory is bounded however long the prompts are.

What a block needs for a piece of `t` positions (attention logits over all columns of the cache, the MLP's inner
states) grows with `t`; the pieces are as long as fits a number of bytes. The answers are the same for every number.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_jax.data.batch import Batch
from mllm_jax.models import mllm
from mllm_jax.models.decoder import Cache
from mllm_jax.models.mllm import MLLM, ModelConfig, Params
from mllm_jax.models.vit import VisionConfig
from mllm_jax.parallel.mesh import current_row_shards

# On every device, for what reading needs besides the cache: on CPUs, and on accelerators, which need long pieces.
CPU_BYTES, ACCELERATOR_BYTES = 256 << 20, 2 << 30
_COPIES = (
    3  # of an intermediate array that are alive at once: before, while and after an elementwise function
)


def without_remat(config: ModelConfig) -> ModelConfig:
    """The same computation without rematerialisation, which only slows compiling down when nothing is learned."""
    return dataclasses.replace(config, remat="none", vision_remat="none")


def prefill_limit(prefill_bytes: int | None = None) -> int:
    """The number of bytes itself, or the default where it is None: 256 MB on CPUs, 2 GB on accelerators.

    Raises:
      ValueError: not a positive number.
    """
    if prefill_bytes is None:
        return CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES
    if prefill_bytes < 1:
        raise ValueError(f"prefill_bytes={prefill_bytes} must be at least 1")
    return prefill_bytes


def piece_length(config: ModelConfig, rows: int, length: int, columns: int, limit: int) -> int:
    """Positions that are read at once: a power of two, or `length` if all of them fit `limit` bytes.

    Args:
      rows: of the batch, split over the devices of the current mesh.
      length: T.
      columns: S, of the cache.
    """
    llm = config.llm
    scores = 4 * llm.heads * columns  # float32
    states = (4 * llm.width + 2 * llm.mlp_width + 2 * llm.heads * llm.head_width) * jnp.dtype(
        config.dtype
    ).itemsize
    per_position = _COPIES * (scores + states) * -(-rows // current_row_shards())
    fitting = max(1, limit // per_position)
    return length if fitting >= length else 1 << (fitting.bit_length() - 1)


def images_at_once(config: ModelConfig, limit: int) -> int:
    """Images that the vision encoder takes at once on one device, a power of two."""
    itemsize, per_image = jnp.dtype(config.dtype).itemsize, 0
    for index, (tower, size) in enumerate(config.vision.inputs(config.slot_size)):
        rows, columns = tower.grid(*size)
        patches, views = rows * columns, 1 if index else config.vision.views
        if isinstance(tower, VisionConfig):
            scores, states = 4 * tower.heads * patches, (4 * tower.width + 2 * tower.mlp_width) * itemsize
        else:  # a ConvNeXt: the maps of all stages, and the widest states of a block
            scores, states = 0, (2 * tower.width + 8 * tower.widths[0]) * itemsize
        per_image = max(per_image, _COPIES * views * patches * (scores + states))
    return 1 << (max(1, limit // per_image).bit_length() - 1)


def read(
    config: ModelConfig,
    params: Params,
    rows: Batch,
    visual: Float[Array, "B IM D"] | None,
    cache: Cache,
    at: Int[Array, "B A"],
    limit: int,
) -> tuple[Float[Array, "B A D"], Cache]:
    """Final-normed hidden states at the positions `at` of the rows, and the cache with all positions written.

    To be called under `jax.jit`.

    Args:
      rows: text and places of visual tokens; its images are not looked at.
      visual: the rows' visual tokens; None for text.
      cache: with room for T more columns.
      limit: bytes, see `piece_length`.
    """
    batch, length = rows.tokens.shape
    piece = piece_length(config, batch, length, cache.segments.shape[1], limit)
    rows = rows.replace(images=None, image_mask=None, grids=None)  # every field left has an axis of positions
    if piece == length:
        hidden, cache = mllm.apply(config, params, rows, visual, cache, method=_continue)
        return jnp.take_along_axis(hidden, at[..., None], axis=1), cache
    first = cache.column

    def body(index: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
        found, cache = carry
        start = jnp.minimum(index * piece, length - piece)  # the last piece reads some positions again
        part = rows.map(lambda field, _: jax.lax.dynamic_slice_in_dim(field, start, piece, axis=1))
        cache = cache.replace(column=first + start)
        hidden, cache = mllm.apply(config, params, part, visual, cache, method=_continue)
        inside = at - start
        states = jnp.take_along_axis(hidden, jnp.clip(inside, 0, piece - 1)[..., None], axis=1)
        here = (inside >= 0) & (inside < piece)
        return jnp.where(here[..., None], states, found), cache

    found = jnp.zeros((*at.shape, config.llm.width), jnp.dtype(config.dtype))
    return jax.lax.fori_loop(0, -(-length // piece), body, (found, cache))


def read_prompts(
    config: ModelConfig,
    params: Params,
    rows: Batch,
    lengths: Int[Array, " B"],
    visual: Float[Array, "B IM D"] | None,
    cache: Cache,
    limit: int,
) -> tuple[Float[Array, "B D"], Int[Array, " B"], Cache]:
    """What answers begin with: the final-normed state of each prompt's last token, its position, and the cache.

    Args:
      lengths: tokens of each prompt; 0 for a row that only fills the batch.
      rows, visual, cache, limit: as in `read`.
    """
    last = jnp.maximum(lengths - 1, 0)[:, None]
    hidden, cache = read(config, params, rows, visual, cache, last, limit)
    return hidden[:, 0], jnp.take_along_axis(rows.positions, last, axis=1)[:, 0], cache


def decode(
    config: ModelConfig, params: Params, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B D"], Cache]:
    """The final-normed state of one more token of every row, and the cache with it."""
    hidden, cache = mllm.apply(config, params, tokens[:, None], positions[:, None], cache, method="decode")
    return hidden[:, 0], cache


def _continue(module: MLLM, rows: Batch, visual: Any, cache: Cache) -> tuple[Array, Cache]:
    return module.llm(module.embed(rows, visual), rows.positions, rows.segment_ids, cache)
