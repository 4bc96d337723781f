"""What accelerators can do at best, per chip, as published: for planning and for MFU."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

GB, TB = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip (one JAX device). Rates are per second.

    Attributes:
      name: as in a topology, "v5p" or "h100".
      kinds: beginnings of `jax.Device.device_kind`.
      flops: dense bfloat16 operations.
      memory: bytes of high-bandwidth memory that a program may use.
      memory_bandwidth: bytes between the chip and its memory.
      network: bytes that a chip can send to its neighbours over all links of the fast network together (ICI, NVLink),
        one way; half of what is published as bidirectional.
      slow_network: bytes between slices or hosts (data-center network), one way, this chip's share.
      source: where the numbers are published; a v4's slow network is from memory.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    memory_bandwidth: float
    network: float
    slow_network: float
    source: str


_GCP = "cloud.google.com/tpu/docs/"
_NVIDIA = (
    "NVIDIA's data sheet; network per GPU of a host with NVSwitch, between hosts 400 Gb/s a GPU (from memory)"
)
GIB = 2**30
# XLA keeps a quarter of a GiB of a v5e to itself and says so when it runs out; the others' share is taken as large.
CHIPS = (
    Chip("v4", ("TPU v4",), 275 * TB, 31.75 * GIB, 1228 * GB, 300 * GB, 3.1 * GB, _GCP + "v4"),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197 * TB, 15.75 * GIB, 819 * GB, 200 * GB, 3.1 * GB, _GCP + "v5e"),
    Chip("v5p", ("TPU v5p", "TPU v5"), 459 * TB, 95.25 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, _GCP + "v5p"),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918 * TB, 31.25 * GIB, 1640 * GB, 400 * GB, 12.5 * GB, _GCP + "v6e"),
    Chip("a100-40", ("NVIDIA A100-SXM4-40GB",), 312 * TB, 40 * GB, 1555 * GB, 300 * GB, 25 * GB, _NVIDIA),
    Chip("a100", ("NVIDIA A100",), 312 * TB, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, _NVIDIA),
    Chip("h200", ("NVIDIA H200",), 989 * TB, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, _NVIDIA),
    Chip("h100", ("NVIDIA H100",), 989 * TB, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, _NVIDIA),
)  # fmt: skip


def by_name(name: str) -> Chip:
    """The chip of a topology.

    Raises:
      ValueError: not in the table; names those that are.
    """
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise ValueError(f"unknown chip {name!r}; known: {', '.join(chip.name for chip in CHIPS)}")


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`; None for one that is not in the table (a CPU, a slower variant)."""
    if re.search("PCIe|NVL", device_kind):
        return None
    found = ((kind, chip) for chip in CHIPS for kind in chip.kinds if device_kind.startswith(kind))
    return max(found, key=lambda pair: len(pair[0]), default=(None, None))[1]


def peak_flops(devices: Iterable[Any]) -> float | None:
    """Dense bfloat16 operations per second of all devices together; None where one of them is not known."""
    chips = [chip_of(device.device_kind) for device in devices]
    return None if None in chips else sum(chip.flops for chip in chips)
