"""Machines that are not here: TPU slices as their compiler knows them, and GPU hosts described by their chips."""

import dataclasses
import math
import os
import re
from typing import Any

from jax.sharding import AbstractMesh, AxisType, Mesh

from mllm_jax.parallel import mesh as meshes
from mllm_jax.parallel.chips import Chip, by_name

# Cloud TPU's names count TensorCores up to v5p, of which a chip has two.
CORES_PER_CHIP = {"v4": 2, "v5p": 2}
SHAPES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


# libtpu would ask the cloud what machine this is, complain that it is none, and let only one process in.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a step is to run.

    Attributes:
      name: as given: "v5p:4x4x4", "v5p-128", "h100:8".
      chip: one of its chips.
      shape: "4x4x4" of a TPU slice; "" of GPUs, for which there is no compiler here.
      chips: in a slice or host.
      slices: of this kind, with a slow network between them.

    Examples:
      >>> machine = parse("v5p-128")
      >>> machine.shape, machine.chip.name, machine.count
      ('4x4x4', 'v5p', 64)
    """

    name: str
    chip: Chip
    shape: str
    chips: int
    slices: int = 1

    @property
    def count(self) -> int:
        """Chips of all slices."""
        return self.chips * self.slices

    def devices(self) -> Any:
        """The devices of a TPU machine, which can be compiled for.

        Raises:
          ImportError: the package `libtpu` is missing.
        """
        for name, value in NO_TPU_HERE.items():
            os.environ.setdefault(name, value)
        try:
            import libtpu  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "compiling for a TPU needs the package libtpu: pip install 'mllm-jax[plan]' (or give --estimate)"
            ) from error
        from jax.experimental import topologies

        options = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # one device a chip, as it runs
        return topologies.get_topology_desc(f"{self.chip.name}:{self.shape}", "tpu", **options).devices

    def mesh(self, sizes: dict[str, int | None]) -> Mesh:
        """The mesh of `config.mesh` on the devices of a TPU machine."""
        return meshes.make_mesh(sizes, self.devices())

    def abstract_mesh(self, sizes: dict[str, int | None]) -> AbstractMesh:
        """The same without devices: enough for shapes and shardings."""
        shape = mesh_shape(sizes, self.count)
        return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def mesh_shape(sizes: dict[str, int | None], devices: int) -> dict[str, int]:
    """Devices per mesh axis, with -1 filled in.

    Raises:
      ConfigError: see `parallel.mesh.make_mesh`.
    """
    return dict(zip(meshes.AXES, meshes.axis_sizes(sizes, devices), strict=True))


def parse(text: str, slices: int = 1) -> Machine:
    """A machine from its name.

    Examples:
      >>> [parse(name).count for name in ("v5p:4x4x4", "v5p-128", "v5e-16", "h100:8")]
      [64, 64, 16, 8]
      >>> parse("v5e-16", slices=2).count
      32

    Args:
      text: CHIP:SHAPE or Cloud TPU's CHIP-NUMBER of a TPU slice (v5p-128 has 64 chips, v5e-64 has 64), or CHIP:NUMBER
        of one host with GPUs.

    Raises:
      ValueError: not a machine that is known here.
    """
    if (found := re.fullmatch(r"(\w+)-(\d+)", text)) and found[1] in SHAPES:
        chips = int(found[2]) // CORES_PER_CHIP.get(found[1], 1)
        fits = [shape for shape in SHAPES[found[1]] if _size(shape) == chips]
        if not fits:
            sizes = (str(_size(shape) * CORES_PER_CHIP.get(found[1], 1)) for shape in SHAPES[found[1]])
            raise ValueError(
                f"--topology={text}: known sizes of {found[1]}: {', '.join(sizes)}; or give a shape as in "
                f"{found[1]}:{SHAPES[found[1]][-1]}"
            )
        return Machine(text, by_name(found[1]), fits[0], chips, slices)
    if found := re.fullmatch(r"([\w-]+):([\dx]+)", text):
        try:
            chip = by_name(found[1])
        except ValueError as error:
            raise ValueError(f"--topology={text}: {error}") from None
        if (found[1] in SHAPES) == ("x" in found[2]):
            return Machine(text, chip, found[2] if "x" in found[2] else "", _size(found[2]), slices)
    raise ValueError(
        f"--topology={text} is no machine that is known here; give a TPU slice as v5p:4x4x4 or v5p-128, or the GPUs "
        "of a host as h100:8"
    )


def _size(shape: str) -> int:
    return math.prod(int(side) for side in shape.split("x") if side)
