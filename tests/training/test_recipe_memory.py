"""What the published recipe keeps on a device, by the plan of its stages: no array is made and nothing is fetched."""

import importlib.util
import math
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from mllm_jax.interop.published import shipped_geometry
from mllm_jax.parallel.mesh import AXES
from mllm_jax.training.stage import StagePlan

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "llava15.py"


def recipe(tuning, llm):
    spec = importlib.util.spec_from_file_location("llava15", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(tuning)
    config.model.llm.path = llm
    return config


def plan(tuning, stage, devices, llm="lmsys/vicuna-7b-v1.5"):
    config = recipe(tuning, llm)
    assert (config.mesh.data, config.mesh.fsdp) == (1, -1)
    sizes = {axis: devices if axis == "fsdp" else 1 for axis in AXES}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    with shipped_geometry():
        found = StagePlan(config, stage, mesh)
        return found.state, found.frozen


def gigabytes(tree, per_device=True):
    """Of arrays on each device, or of all."""

    def size(leaf):
        shape = leaf.sharding.shard_shape(leaf.shape) if per_device else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree))) / 1e9


@pytest.mark.parametrize(
    ("tuning", "stage", "alone", "of_eight", "of_64"),
    [
        ("full", "pretrain", 14.3, 2.0, 0.5),
        ("full", "finetune", 81.7, 10.4, 1.5),
        ("lora", "finetune", 18.1, 2.5, 0.5),
    ],
)
def test_state_is_shared_by_all_devices(tuning, stage, alone, of_eight, of_64):
    """The table in docs/launch.md."""
    for devices, expected in ((1, alone), (8, of_eight), (64, of_64)):
        found = gigabytes(plan(tuning, stage, devices))
        assert found == pytest.approx(expected, abs=0.055)


def test_a_checkpoint_holds_parameters_and_two_moments():
    state, _ = plan("full", "finetune", 8)
    assert gigabytes([state.params, state.opt_state], per_device=False) == pytest.approx(81.1, abs=0.055)
    state, _ = plan("lora", "finetune", 8)
    assert gigabytes([state.params, state.opt_state], per_device=False) == pytest.approx(4.1, abs=0.055)
