"""Who attends to whom, kept symbolic so that a fused kernel never sees a [T, S] array."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@flax.struct.dataclass
class AttentionMask:
    """Rules by which a query attends to a key; the kind of mask is static, ids and columns are arrays.

    A query at column t of segment a attends to a key at column s of segment b when a == b != 0 and, if
    `causal`, s <= t. Columns are places in the row or (cache) buffer, not rotary positions. With a `window` w,
    only the w latest keys up to the query's own are attended to, padding columns not counted.

    Attributes:
      q_segments: int32[B, T], 0 = padding. Columns of one segment are consecutive but for padding between them.
      kv_segments: int32[B, S]; without a cache those of the queries, without padding inside a segment.
      q_columns: int32[T], the keys' columns that the queries stand at, ascending, or int32[B, T] where every row has
        its own; None = no cache: queries and keys are the same columns.
      causal: static.
      window: static; None = no limit. Needs `causal`.
    """

    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    q_columns: Int[Array, " T"] | Int[Array, "B T"] | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def dense(self) -> Bool[Array, "B T S"]:
        """The mask as booleans, True = attend."""
        keys = self.kv_segments[:, None]
        allowed = (self.q_segments[:, :, None] == keys) & (keys != 0)
        length = self.kv_segments.shape[1]
        columns = jnp.arange(length) if self.q_columns is None else self.q_columns
        if self.causal:
            allowed &= jnp.arange(length) <= columns[..., None]
        if self.window is not None and self.window < length:
            # Keys are counted without padding: in a cache that of a short prompt may lie between them.
            count = jnp.cumsum(self.kv_segments != 0, axis=1)
            here = count[:, columns] if columns.ndim == 1 else jnp.take_along_axis(count, columns, axis=1)
            allowed &= here[:, :, None] - count[:, None] < self.window
        return allowed

    def key_ranges(self) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The first and the last column that each query attends to, all between them included.

        Without a cache only, where every query's keys are consecutive. Padding has a last column before its first.
        """
        segments, columns = self.q_segments, jnp.arange(self.q_segments.shape[1])
        edge = segments[:, 1:] != segments[:, :-1]
        ends = jnp.ones_like(segments[:, :1], bool)
        starts = jnp.where(jnp.concatenate([ends, edge], axis=1), columns, 0)
        first = jax.lax.cummax(starts, axis=1)
        if self.window is not None:
            first = jnp.maximum(first, columns - self.window + 1)
        if self.causal:
            last = jnp.broadcast_to(columns, segments.shape)
        else:
            stops = jnp.where(jnp.concatenate([edge, ends], axis=1), columns, len(columns))
            last = jax.lax.cummin(stops, axis=1, reverse=True)
        return first, jnp.where(segments == 0, first - 1, last)
