"""Meshes: what sizes and slices they may have, and which devices stand where."""

import dataclasses

import jax
import numpy as np
import pytest

from mllm_jax.config import ConfigError, default_config
from mllm_jax.parallel.mesh import AXES, make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as decides its place."""

    id: int
    slice_index: int = 0
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def ids(mesh):
    return np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)


def test_the_configuration_has_every_axis():
    keys = set(default_config().mesh)
    assert keys == {*AXES, "cpu_devices", "slices"}
    mesh = make_mesh(default_config().mesh.to_dict(), jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)


def test_axes_that_are_not_named_are_1_and_tensor_is_nearest():
    mesh = make_mesh({"tensor": 2, "fsdp": -1}, [Device(i) for i in range(8)])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    assert ids(mesh).reshape(4, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    "devices",
    [
        [Device(i, slice_index=i % 2) for i in range(16)],  # they say so, in any order
        [Device(2 * (i % 8) + i // 8) for i in range(16)],  # they do not, and are cut in their order
    ],
    ids=["told", "cut"],
)
def test_data_is_split_over_slices_and_the_rest_stays_inside(devices):
    sizes = {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 2, "slices": 2}
    places = ids(make_mesh(sizes, devices)) % 2
    assert (places[0] == 0).all()
    assert (places[1] == 1).all()
    # Where data is too small, fsdp spans them too: its first half is one slice.
    places = ids(make_mesh({"data": 1, "fsdp": 4, "sequence": 2, "tensor": 2, "slices": 2}, devices)) % 2
    assert (places[:, :2] == 0).all()
    assert (places[:, 2:] == 1).all()


def test_four_slices_are_shared_by_data_and_fsdp():
    devices = [Device(i, slice_index=i // 4) for i in range(16)]
    found = ids(make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, devices)) // 4
    assert found[0, :, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert found[1, :, 0].tolist() == [[2, 2], [2, 2], [3, 3], [3, 3]]


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        (
            {"tensor": 8},
            [Device(i, i // 4) for i in range(8)],
            r"2 slices must divide mesh.data \(1\) x mesh.fsdp",
        ),
        ({"data": 8, "slices": 4}, [Device(i, i // 4) for i in range(8)], "the 8 devices form 2 slices"),
        ({"data": 9}, [Device(i, i // 5) for i in range(9)], r"the slices have \[5, 4\] devices"),
        ({"data": 8, "slices": 2}, [Device(i, platform="tpu") for i in range(8)], "form 1 slices"),
    ],
)
def test_meshes_that_do_not_fit_the_slices_are_refused(sizes, devices, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(sizes, devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1, "tensor": 1}, "at most one axis may be -1"),
        ({"data": 2, "fsdp": 1, "tensor": 1}, "which 1 devices cannot form"),
        ({"data": -1, "fsdp": 2, "tensor": 1}, "which 1 devices cannot form"),
        ({"data": 1, "model": 1}, "has the axes data, fsdp, sequence, tensor, not model"),
        ({"data": 1, "sequence": 2}, "which 1 devices cannot form"),
        ({"data": 1, "slices": 2}, "the 1 devices form 1 slices"),
    ],
)
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(sizes, jax.devices()[:1])
