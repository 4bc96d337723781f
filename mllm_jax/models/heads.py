"""How attention heads are shared between the devices of a tensor-parallel group; a head is never split."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split(heads: int, kv_heads: int, devices: int) -> tuple[int, int]:
    """Into how many parts the heads of queries, and those of keys and values, are split: `devices`, or 1 (whole).

    A device's queries need whole groups or a part of one. Keys and values are whole everywhere where `devices` does
    not divide their heads, and so is all of attention where queries cannot be split.

    Example:
      >>> split(28, 4, 4), split(8, 2, 8), split(28, 4, 8)
      ((4, 4), (8, 1), (1, 1))
    """
    if heads % devices or (kv_heads % devices and devices % kv_heads):
        return 1, 1
    return devices, 1 if kv_heads % devices else devices


def devices_over(axis: str) -> int:
    """Devices over which the current mesh and logical rules split a logical axis (1 without)."""
    name = dict(nn.get_logical_axis_rules()).get(axis)
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def repeated(x: Float[Array, "B S K h"], heads: int) -> Float[Array, "B S n h"]:
    """Keys or values as split attention takes them: one per query head where the queries of a group are apart.

    Otherwise as they are. Without this the compiler would split the few heads after all, and gather their gradients.
    """
    kv_heads = x.shape[2]
    of_queries, of_keys = split(heads, kv_heads, devices_over("heads"))
    if of_queries == of_keys or kv_heads == 1:
        return x
    each = jnp.arange(heads) // (heads // kv_heads)
    return nn.with_logical_constraint(jnp.take(x, each, axis=2), ("batch", None, "heads", None))
