"""JAX's splash attention: TPUs; blocks that the causal rule or the window rules out are never computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.models.attention.devices import per_device
from mllm_jax.models.attention.mask import AttentionMask
from mllm_jax.models.attention.use import Use

PACKAGES = ("jax", "jaxlib", "libtpu")
_LANES = 128  # rows are padded to a multiple; the padding is a segment of its own
_BLOCKS = (512, 256, 128)


def refusal(use: Use) -> str | None:
    """Nothing that a model here needs is beyond it."""


def attend(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: AttentionMask | None,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T H h"]:
    """`mllm_jax.models.attention.attend` with every argument given and T = S.

    Args:
      interpret: run the kernel as plain operations, on any platform (slow; for tests).
    """
    batch, length = q.shape[:2]
    segments = jnp.ones((batch, length), jnp.int32) if mask is None else mask.q_segments
    padding = [(0, 0), (0, -length % _LANES)]
    segments = jnp.pad(segments, padding)
    q, k, v = (jnp.pad(x, [*padding, (0, 0), (0, 0)]) for x in (q * scale, k, v))

    def kernel(q, k, v, segments):
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        rule = _rule(q.shape[1], mask)
        run = splash.make_splash_mha(
            splash.MultiHeadMask([rule] * q.shape[2]),
            block_sizes=_block_sizes(q.shape[1]),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.vmap(run)(q, k, v, splash.SegmentIds(segments, segments)).swapaxes(1, 2)

    return per_device(kernel, q, k, v, segments)[:, :length]


def _rule(length: int, mask: AttentionMask | None) -> Any:
    """The static part of the mask, as splash attention's own object."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    if mask is None or not mask.causal:
        return splash.FullMask(shape)
    if mask.window is None:
        return splash.CausalMask(shape)
    return splash.LocalMask(shape, window_size=(mask.window - 1, 0), offset=0)


def _block_sizes(length: int) -> Any:
    """The same for all loops: the largest that divides the row."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in _BLOCKS if length % size == 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    return splash.BlockSizes(**{f"block_{name}": block for name in names})
