"""Who attends to whom, kept symbolic so that a fused kernel never sees a [T, S] array."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@flax.struct.dataclass
class AttentionMask:
    """Rules by which a query attends to a key; the kind of mask is static, ids and columns are arrays.

    A query at column t of segment a attends to a key at column s of segment b when a == b != 0 and, if
    `causal`, s <= t. Columns are places in the (cache) buffer, not rotary positions. With a `window` w,
    only the w latest keys up to the query's own are attended to, padding columns not counted.

    Attributes:
      q_segments: int32[B, T], 0 = padding. Columns of one segment are consecutive but for padding between them.
      kv_segments: int32[B, S].
      q_columns: int32[T], the keys' columns that the queries stand at, ascending.
      causal: static.
      window: static; None = no limit. Needs `causal`.
    """

    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    q_columns: Int[Array, " T"]
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def dense(self) -> Bool[Array, "B T S"]:
        """The mask as booleans, True = attend."""
        keys = self.kv_segments[:, None]
        allowed = (self.q_segments[:, :, None] == keys) & (keys != 0)
        length = self.kv_segments.shape[1]
        if self.causal:
            allowed &= jnp.arange(length) <= self.q_columns[:, None]
        if self.window is not None and self.window < length:
            # Keys are counted without padding: in a cache that of a short prompt may lie between them.
            count = jnp.cumsum(self.kv_segments != 0, axis=1)
            allowed &= count[:, self.q_columns, None] - count[:, None] < self.window
        return allowed
