"""Which rows of a batch a process reads: those that its devices hold."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from mllm_jax.config import ConfigError
from mllm_jax.parallel.mesh import num_row_shards


class RowPart(NamedTuple):
    """A process's part of every batch.

    Attributes:
      index: of the part.
      count: of parts, all of the same size; fewer than processes where `tensor` or `sequence` spans several.
      first: whether this process is the first of those that read this part.
    """

    index: int = 0
    count: int = 1
    first: bool = True


def row_part(mesh: Mesh, process: int | None = None) -> RowPart:
    """The part of every batch that a process reads (default: this one).

    Processes whose devices hold the same rows read the same part.

    Raises:
      ConfigError: some rows, but not all, are held by two processes; names `mesh` and the processes.
    """
    process = jax.process_index() if process is None else process
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(num_row_shards(mesh), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) > num_row_shards(mesh) or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            f"config key 'mesh' is {dict(mesh.shape)}: some hosts share only a part of their rows with others; "
            f"mesh.tensor x mesh.sequence must divide the {mesh.size // len(held)} devices of a host, or be a multiple "
            "of them"
        )
    if process not in held:  # a mesh of other processes, or one that is only planned
        return RowPart()
    own = tuple(sorted(held[process]))
    return RowPart(parts.index(own), len(parts), process == min(p for p in held if held[p] == held[process]))
