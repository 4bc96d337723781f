"""The device mesh: data parallel, parameter-sharded data parallel and tensor parallel axes."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import Batch

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # mesh axes over which the rows of a batch are split

# What the models' logical activation axes mean on the mesh.
ACTIVATION_RULES = (("batch", ROWS), ("length", None), ("embed", None), ("heads", "tensor"))


def make_mesh(shape: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes `AXES`.

    Args:
      shape: devices per axis; at most one axis may be -1, the remaining devices.

    Raises:
      ConfigError: other axes, or they do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if set(shape) != set(AXES):
        raise ConfigError(f"a mesh has the axes {', '.join(AXES)}, not {', '.join(shape) or 'none'}")
    sizes = [int(shape[axis]) for axis in AXES]
    if sizes.count(-1) > 1:
        raise ConfigError(f"config key 'mesh' is {dict(shape)}: at most one axis may be -1")
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise ConfigError(
            f"config key 'mesh' is {dict(shape)}, which {len(devices)} devices cannot form; its axes must multiply to "
            "the number of devices"
        )
    # `make_mesh` would make the axes Explicit by default; the models leave propagation to the compiler.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes `mesh` current and gives the models' logical axes their meaning on it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATION_RULES):
        yield


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over the data axes."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def batch_shardings(batch: Batch, mesh: Mesh | AbstractMesh) -> Batch:
    """The sharding of every field of a batch (arrays or shapes) that a jitted function takes."""
    rules = dict(ACTIVATION_RULES)
    return batch.map(
        lambda _, field: NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in field["axes"])))
    )


def num_row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def current_row_shards() -> int:
    """Into how many parts the current mesh splits the rows of a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in ROWS)


def replicate(tree: Any) -> Any:
    """Arrays inside a jitted function, whole on every device of the mesh, so that every process can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
