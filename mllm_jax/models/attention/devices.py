"""A kernel on every device's own rows and heads: the compiler cannot split what it cannot look into."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from mllm_jax.models.heads import devices_over, split


def per_device(
    kernel: Callable[..., Array],
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    *of_rows: Shaped[Array, "B ..."],
) -> Float[Array, "B T H h"]:
    """`kernel(q, k, v, *of_rows)` under `jax.shard_map` on the current mesh, or as it is where there is one device.

    Rows are split like the models' logical axis "batch", heads like "row_heads" where the devices divide them
    (heads.py), and everything is whole on all devices where they do not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, *of_rows)
    rules = dict(nn.get_logical_axis_rules())
    rows = rules.get("batch")
    if q.shape[0] % math.prod(mesh.shape[axis] for axis in rows or ()):
        rows = None
    of_queries, of_keys = split(q.shape[2], k.shape[2], devices_over("row_heads"))
    if of_queries != of_keys and k.shape[2] > 1:
        of_queries = of_keys = 1  # a device's queries would need to know which of all keys are theirs
    heads = rules.get("row_heads")
    queries = P(rows, None, heads if of_queries > 1 else None)
    keys = P(rows, None, heads if of_keys > 1 else None)
    return jax.shard_map(
        kernel, in_specs=(queries, keys, keys, *[P(rows)] * len(of_rows)), out_specs=queries, check_vma=False
    )(q, k, v, *of_rows)
