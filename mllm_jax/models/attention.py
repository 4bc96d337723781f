"""One dispatcher for attention: callers say what may attend to what, an implementation computes it."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("xla",)


@flax.struct.dataclass
class AttentionMask:
    """Who attends to whom, kept symbolic so that fused kernels never see a [T, S] array.

    A query at column t of segment a attends to a key at column s of segment b when a == b != 0 and, if
    `causal`, s <= t. Columns are places in the (cache) buffer, not rotary positions. With a `window` w,
    only the w latest keys up to the query's own are attended to, padding columns not counted.

    Attributes:
      q_segments: int32[B, T], 0 = padding.
      kv_segments: int32[B, S].
      q_columns: int32[T] or int32[B, T].
      kv_columns: int32[S] or int32[B, S].
      window: None = no limit; an int when it is the same for all blocks, else a scalar per block.
      causal: static.
    """

    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    q_columns: Int[Array, "*b T"]
    kv_columns: Int[Array, "*b S"]
    window: int | Int[Array, ""] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)

    def dense(self) -> Bool[Array, "B T S"]:
        """The mask as booleans, True = attend."""
        allowed = (self.q_segments[:, :, None] == self.kv_segments[:, None, :]) & (self.kv_segments != 0)[
            :, None
        ]
        if self.causal:
            allowed &= self.kv_columns[..., None, :] <= self.q_columns[..., :, None]
        every = isinstance(self.window, int) and self.window >= self.kv_segments.shape[1]
        if self.window is not None and not every:
            # Columns are counted backwards from the query: positions are consecutive within a segment, but
            # in a cache the padding of a short prompt may lie between.
            later = jnp.cumsum(allowed[..., ::-1], axis=-1)[..., ::-1]
            allowed &= later <= self.window
        return allowed


def attend(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: AttentionMask | None = None,
    implementation: str = "xla",
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H h"]:
    """Scaled dot-product attention with grouped heads (H a multiple of K); softmax in float32.

    Args:
      mask: None = everything attends to everything.
      implementation: "xla", the oracle of all others.
      scale: of q k; None = h^-1/2.
      softcap: c in c tanh(logits / c), before the mask (Gemma 2).

    Raises:
      ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"model.attention={implementation!r}; valid: {', '.join(IMPLEMENTATIONS)}")
    batch, length, heads, head_width = q.shape
    groups = k.shape[2]
    # Heads before tokens: batched matrix products then need no transposed operands in the backward pass.
    q = q.reshape(batch, length, groups, heads // groups, head_width).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    logits = logits * (head_width**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        # A padding query has no allowed key: a large finite value keeps its (unused) row free of NaN.
        logits = jnp.where(mask.dense()[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_width)
