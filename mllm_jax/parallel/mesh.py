"""The device mesh: data parallel, parameter-sharded data parallel, context parallel and tensor parallel axes."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import Batch
from mllm_jax.models.heads import devices_over

# From the axis that needs least of the network to the one that needs most, whose devices are nearest to each other.
AXES = ("data", "fsdp", "sequence", "tensor")
OF_DEVICES = ("cpu_devices", "slices")  # the other keys of `config.mesh`
ROWS = ("data", "fsdp")  # mesh axes over which the rows of a batch are split

# What the models' logical activation axes mean on the mesh: in training, and where answers are generated, whose rows
# grow by one position at a time and so are never cut.
ACTIVATION_RULES = (
    ("batch", ROWS),
    ("length", "sequence"),
    ("embed", None),
    ("heads", "tensor"),
    ("row_heads", ("tensor", "sequence")),
    ("vocab", "tensor"),
    ("images", AXES),
)
ANSWERING_RULES = (
    ("batch", (*ROWS, "sequence")),
    ("length", None),
    ("embed", None),
    ("heads", "tensor"),
    ("row_heads", "tensor"),
    ("vocab", "tensor"),
    ("images", AXES),
)
Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def make_mesh(sizes: Mapping[str, int | None], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with the axes `AXES`.

    Examples:
      >>> dict(make_mesh({"data": 1, "fsdp": -1}, jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}

    Args:
      sizes: devices per axis, as in `config.mesh`; 1 for an axis that is not named. At most one may be -1, the
        remaining devices. `slices` is the number of groups with a slow network between them; None, or not given, takes
        what the devices say (slices of TPUs, hosts of GPUs). `data` is split over the slices first, then `fsdp`; the
        other axes stay inside a slice. `cpu_devices` is not looked at: the devices are made before (cpu_devices.py).

    Raises:
      ConfigError: other axes, they do not multiply to the number of devices, or they do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = axis_sizes(sizes, len(devices))
    groups = _slices(devices, sizes.get("slices"))
    across = [math.gcd(shape[0], len(groups))]
    across.append(len(groups) // across[0])
    if shape[1] % across[1]:
        raise ConfigError(
            f"config key 'mesh.slices': {len(groups)} slices must divide mesh.data ({shape[0]}) x mesh.fsdp "
            f"({shape[1]}); mesh.tensor and mesh.sequence stay inside a slice of {len(groups[0])} devices"
        )
    inside = (shape[0] // across[0], shape[1] // across[1], *shape[2:])
    arranged = np.stack([_arranged(inside, group) for group in groups]).reshape(*across, *inside)
    # `jax.make_mesh` would make the axes Explicit by default; the models leave propagation to the compiler.
    return Mesh(arranged.swapaxes(1, 2).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(sizes: Mapping[str, int | None], devices: int) -> tuple[int, ...]:
    """Devices per axis of `AXES`, with -1 filled in; errors as `make_mesh`."""
    sizes = {axis: size for axis, size in sizes.items() if axis not in OF_DEVICES}
    if unknown := sizes.keys() - set(AXES):
        raise ConfigError(f"a mesh has the axes {', '.join(AXES)}, not {', '.join(sorted(unknown))}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1:
        raise ConfigError(f"config key 'mesh' is {dict(sizes)}: at most one axis may be -1")
    fixed = math.prod(size for size in shape if size != -1)
    shape = [devices // fixed if size == -1 else size for size in shape]
    if math.prod(shape) != devices or min(shape) < 1:
        raise ConfigError(
            f"config key 'mesh' is {dict(sizes)}, which {devices} devices cannot form; its axes must multiply to "
            "the number of devices"
        )
    return tuple(shape)


def _slices(devices: Sequence[Any], asked: int | None) -> list[list[Any]]:
    """The devices of every slice; where they know of no slices (all but TPUs), they are cut in their order."""
    found: dict[int, list[Any]] = {}
    for device in devices:
        found.setdefault(getattr(device, "slice_index", 0), []).append(device)
    groups = [found[index] for index in sorted(found)]
    if len(groups) == 1 and asked and len(devices) % asked == 0 and devices[0].platform != "tpu":
        size = len(devices) // asked
        groups = [list(devices[start : start + size]) for start in range(0, len(devices), size)]
    counts = [len(group) for group in groups]
    if asked not in (None, len(groups)):
        raise ConfigError(
            f"config key 'mesh.slices' is {asked}, but the {len(devices)} devices form {len(groups)} slices of "
            f"{counts[0]}; leave it None"
        )
    if len(set(counts)) > 1:
        raise ConfigError(f"the slices have {counts} devices; a mesh needs the same number in each")
    return groups


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices of one slice as an array whose last axes have the shortest ways between them."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis that is no product of the TPU's own: 8 of 4 x 4 x 4
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = ACTIVATION_RULES) -> Iterator[None]:
    """Makes `mesh` current and gives the models' logical axes their meaning on it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over the data axes."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def batch_shardings(batch: Batch, mesh: Mesh | AbstractMesh) -> Batch:
    """The sharding of every field of a batch (arrays or shapes) that a jitted function takes.

    Rows alone are split: tokens and the like are small, and with whole rows every device has its positions' neighbours.
    """
    rules = {"batch": ROWS}
    return batch.map(
        lambda _, field: NamedSharding(mesh, PartitionSpec(*(rules.get(axis) for axis in field["axes"])))
    )


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def current_row_shards() -> int:
    """Into how many parts the current mesh splits the rows of a batch; 1 without a mesh."""
    return devices_over("batch")


def replicate(tree: Any) -> Any:
    """Arrays inside a jitted function, whole on every device of the mesh, so that every process can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
