"""Attention as two matrix products and a softmax: the oracle of all other implementations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.models.attention.mask import AttentionMask
from mllm_jax.models.attention.use import Use


def attend(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: AttentionMask | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H h"]:
    """`mllm_jax.models.attention.attend` with every argument given; logits [B, H, T, S] exist in float32."""
    batch, length, heads, head_width = q.shape
    weights = attention_weights(q, k, mask, scale, softcap).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v.transpose(0, 2, 1, 3))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_width)


def attention_weights(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    mask: AttentionMask | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B K G T S"]:
    """The float32 weights of `attend`, head g of the G that share key head k at [k, g]; they sum to 1 over S."""
    batch, length, heads, head_width = q.shape
    groups = k.shape[2]
    # Heads before tokens: batched matrix products then need no transposed operands in the backward pass.
    q = q.reshape(batch, length, groups, heads // groups, head_width).transpose(0, 2, 3, 1, 4)
    k = k.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        # A padding query has no allowed key: a large finite value keeps its (unused) row free of NaN.
        logits = jnp.where(mask.dense()[:, None, None], logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def refusal(use: Use) -> str | None:
    """Nothing is beyond it."""
