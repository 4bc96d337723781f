"""Where parameters are assembled: host arrays, or device arrays in their final sharding, one tensor at a time."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mllm_jax.interop.assemble import Placement, Shape, leaf_dtypes
from mllm_jax.interop.source import Source
from mllm_jax.models.paths import unflatten


@functools.partial(jax.jit, donate_argnums=0)
def _set_block(stack: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, block, index, 0)


@functools.cache
def _zeros(shape: Shape, dtype: Any, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def _of_block(sharding: Sharding) -> Sharding:
    """The sharding of one block of a stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """Each process hands over the shards it holds."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def read_to_devices(
    source: Source,
    placements: Sequence[Placement],
    shapes: Mapping[str, Shape],
    sharding_of: Callable[[str, Shape], Sharding],
    dtype: Any = None,
) -> dict[str, Any]:
    """Reads placed tensors one at a time into device arrays.

    On the host there is never more than one tensor and its converted copy. A stack of blocks is allocated once
    and filled in place.

    Args:
      sharding_of: (path, shape) -> sharding of the whole parameter.
      dtype: of the result; None keeps the source's.
    """
    dtypes = leaf_dtypes(source, placements)
    leaves: dict[str, jax.Array] = {}
    for placement in placements:
        path = placement.path
        sharding, target = sharding_of(path, shapes[path]), np.dtype(dtype or dtypes[path])
        array = placement.rule.read(source.read(placement.name)).astype(target, copy=False)
        if placement.index is None:
            leaves[path] = jax.block_until_ready(_put(array, sharding))
            continue
        if path not in leaves:
            leaves[path] = _zeros(shapes[path], target, sharding)()
        block = _put(array, _of_block(sharding))
        leaves[path] = jax.block_until_ready(_set_block(leaves[path], block, jnp.int32(placement.index)))
    return unflatten({path: leaves[path] for path in shapes})
