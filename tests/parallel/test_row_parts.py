"""Which rows each process reads, on meshes of several hosts."""

import dataclasses

import pytest

from mllm_jax.config import ConfigError
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.parallel.row_parts import RowPart, row_part


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as decides its place."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def parts(sizes, hosts, per_host=4):
    devices = [Device(i, i // per_host) for i in range(hosts * per_host)]
    mesh = make_mesh(sizes, devices)
    return [tuple(row_part(mesh, host)) for host in range(hosts)]


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "tensor": 4}, {"data": 4, "sequence": 2}])
def test_hosts_read_different_rows(sizes):
    assert parts(sizes, hosts=2) == [(0, 2, True), (1, 2, True)]


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"sequence": 2, "tensor": 4}, {"sequence": 8}])
def test_hosts_whose_devices_share_rows_read_the_same(sizes):
    assert parts(sizes, hosts=2) == [(0, 1, True), (0, 1, False)]
    assert parts({"data": 2, **sizes}, hosts=4) == [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)]


def test_hosts_that_share_some_rows_only_are_refused():
    with pytest.raises(
        ConfigError, match=r"tensor x mesh\.sequence must divide the 4 devices of a host, or be a mult"
    ):
        parts({"data": 4, "tensor": 3}, hosts=3)


def test_a_planned_mesh_is_read_whole():
    assert row_part(make_mesh({"data": 4}, [Device(i, 7) for i in range(4)])) == RowPart()
