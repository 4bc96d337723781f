"""Attention where devices share the positions of a row (context parallelism).

Every backend needs a query's whole row. So the devices trade positions for heads before attention and back after it
(DeepSpeed-Ulysses, arXiv 2309.14509): each computes whole rows of some heads, by any backend, and all have the same
work under any mask. What crosses the network are queries, keys, values and outputs, once each.
"""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.models.heads import devices_over, split


def with_whole_rows(
    attend: Callable[[Array, Array, Array], Array],
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
) -> Float[Array, "B T H h"]:
    """`attend(q, k, v)` with heads in place of positions split over the devices that share a row.

    Where these do not divide the heads, each computes everything: right, but slow, and refused in training
    (`training.preflight`).
    """
    if devices_over("length") == 1:
        return attend(q, k, v)
    as_projected = split(q.shape[2], k.shape[2], devices_over("heads"))
    of_rows = split(q.shape[2], k.shape[2], devices_over("row_heads"))

    def split_by(x: Array, length: str | None, heads: str, parts: int) -> Array:
        return nn.with_logical_constraint(x, ("batch", length, heads if parts > 1 else None, None))

    # Both sides of the exchange are said, or the compiler would move it before the projections.
    (q_before, k_before), (q_within, k_within) = as_projected, of_rows
    q = split_by(split_by(q, "length", "heads", q_before), None, "row_heads", q_within)
    k, v = (split_by(split_by(x, "length", "heads", k_before), None, "row_heads", k_within) for x in (k, v))
    out = split_by(attend(q, k, v), None, "row_heads", q_within)
    return split_by(out, "length", "heads", q_before)
