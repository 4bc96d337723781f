"""How attention heads are shared between devices; a head is never split.

Devices of the logical axis "heads" share the weights. Where devices also share the positions of a row ("length"), those
of "row_heads" share the heads while attention sees whole rows (attention/rows.py).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split(heads: int, kv_heads: int, devices: int) -> tuple[int, int]:
    """Into how many parts the heads of queries, and those of keys and values, are split: `devices`, or 1 (whole).

    Keys and values are whole everywhere where `devices` does not divide their heads, and so is all of attention where
    it does not divide those of queries.

    Example:
      >>> split(28, 4, 4), split(8, 2, 8), split(28, 4, 8)
      ((4, 4), (8, 1), (1, 1))
    """
    if heads % devices:
        return 1, 1
    return devices, 1 if kv_heads % devices else devices


def devices_over(axis: str) -> int:
    """Devices over which the current mesh and logical rules split a logical axis (1 without)."""
    names = dict(nn.get_logical_axis_rules()).get(axis) or ()
    names = (names,) if isinstance(names, str) else names
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in names)


def repeated(x: Float[Array, "B S K h"], heads: int) -> Float[Array, "B S n h"]:
    """Keys or values as split attention takes them: one per query head where the queries of a group are apart.

    Otherwise as they are. Without this the compiler would split the few heads after all, and gather their gradients.
    """
    kv_heads = x.shape[2]
    of_queries, of_keys = split(heads, kv_heads, devices_over("row_heads"))
    if of_queries == of_keys or kv_heads == 1:
        return x
    each = jnp.arange(heads) // (heads // kv_heads)
    return nn.with_logical_constraint(jnp.take(x, each, axis=2), ("batch", "length", "heads", None))
