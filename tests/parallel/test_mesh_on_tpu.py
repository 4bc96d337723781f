"""Meshes of real TPU topologies, described by libtpu without a TPU."""

import re

import numpy as np
import pytest

from mllm_jax.parallel.row_parts import row_part
from mllm_jax.planning.topology import parse
from mllm_jax.training.stage import StagePlan

pytest.importorskip("libtpu")


def slices(mesh):
    return np.vectorize(lambda device: device.slice_index, otypes=[int])(mesh.devices)


def test_a_step_whose_rows_are_cut_compiles(tiny_config):
    """With splash attention, which sees whole rows of a device's heads."""
    tiny_config.model.dtype = "bfloat16"
    mesh = parse("v5p:2x2x1").mesh({"fsdp": 2, "sequence": 2})
    text = StagePlan(tiny_config, "finetune", mesh).lower().compile().as_text()
    assert text.count("tpu_custom_call") == 4  # forward of the tower; forward, dq and dkv of the LLM
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) >= 4


def test_two_slices_are_split_by_fsdp_and_nothing_else():
    mesh = parse("v5p:2x2x2", slices=2).mesh({"fsdp": -1, "sequence": 2, "tensor": 2})
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "sequence": 2, "tensor": 2}
    assert (slices(mesh)[:, :2] == 0).all()
    assert (slices(mesh)[:, 2:] == 1).all()


@pytest.mark.parametrize("tensor", [2, 4, 8])  # 8 is no product of 4, 4 and 4
def test_hosts_of_a_slice_read_all_rows_once_or_together(tensor):
    mesh = parse("v5p:4x4x4").mesh({"fsdp": -1, "tensor": tensor})
    found = [row_part(mesh, host) for host in range(16)]
    assert {part.index for part in found} == set(range(found[0].count))
    # JAX's versions lay four chips along an axis, over two hosts, or into one host's square.
    hosts = {device.process_index for device in mesh.devices.reshape(-1, tensor)[0]}
    assert len(hosts) in ({2: (1,), 4: (1, 2), 8: (2,)}[tensor])
    assert sum(part.first for part in found) == found[0].count == 16 // len(hosts)
