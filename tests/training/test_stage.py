"""A stage's plan: the same shapes and program as the real stage, made without an array."""

import json

import jax
import numpy as np
import psutil
import pytest

from mllm_jax.config import stage_config
from mllm_jax.inference import runs
from mllm_jax.models import paths
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training.params import starting_params
from mllm_jax.training.stage import StagePlan
from mllm_jax.training.step import to_device


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def change_lora(stage):
    stage.trainable = ("connector/.*",)
    stage.lora.rank, stage.quantize_base = 2, "int8"


def change_cache(stage):
    stage.trainable, stage.cache_features = ("connector/.*", "llm/blocks/.*"), True


@pytest.mark.parametrize(
    "change", [lambda stage: None, change_lora, change_cache], ids=["plain", "lora", "cache"]
)
def test_the_plan_is_what_the_stage_makes(tiny_config, mesh, change):
    change(tiny_config.stages.finetune)
    plan = StagePlan(tiny_config, "finetune", mesh)
    model = runs.model_config(tiny_config)
    params = starting_params(
        tiny_config, model, "finetune", starting_params(tiny_config, model, "pretrain", None)
    )
    state, frozen = plan.create_state(params), plan.place_frozen(params)
    assert described(state) == described(plan.state)
    assert described(frozen) == described(plan.frozen)
    assert ("vision" in plan.frozen) != tiny_config.stages.finetune.cache_features
    assert plan.whole(state, frozen, plan.unused(params)).keys() == {"vision", "connector", "llm"}
    with use_mesh(mesh):
        batch = to_device(plan.batch.empty(), mesh)
        assert described(batch) == described(plan.batch)
        # What was compiled ahead of time takes the real arrays.
        state, metrics = plan.lower().compile()(state, frozen, batch)
    assert int(state.step) == 1
    assert float(metrics["label_tokens"]) == 0


def test_a_packed_stage_has_the_rows_of_its_data_and_its_own_slots(tiny_config, mesh):
    stage = tiny_config.stages.finetune
    alone = StagePlan(tiny_config, "finetune", mesh)
    assert alone.batch.image_mask.shape == (stage.batch_size, tiny_config.data.image_slots)
    stage.samples_per_row, stage.image_slots = 8, tiny_config.data.image_slots + 2
    packed = StagePlan(tiny_config, "finetune", mesh, rows=3)
    assert packed.batch.image_mask.shape == (3, stage.image_slots)
    assert packed.batch.tokens.shape == (3, packed.seq_len)


def test_logits_are_computed_for_as_many_positions_as_the_data_supervise(tiny_config, mesh):
    limit = tiny_config.data.label_tokens or StagePlan(tiny_config, "finetune", mesh).seq_len
    tiny_config.data.label_tokens = limit + 32
    assert StagePlan(tiny_config, "finetune", mesh).label_tokens == limit + 32
    for measured, computed in ((0, 32), (32, 32), (33, 64), (limit + 32, limit + 32)):
        plan = StagePlan(tiny_config, "finetune", mesh, rows=2, most_labels=measured)
        assert plan.label_tokens == min(computed, limit + 32), measured


def llama_7b(config, directory):
    """The tiny recipe with an LLM of 6.7 billion parameters, of which there is a `config.json` only."""
    directory.mkdir()
    fields = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "hidden_act": "silu",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    config.model.llm.path = str(directory)
    config.model.llm.remat = "full"
    config.stages.finetune.seq_len = 2048
    return config


def test_a_7b_stage_is_lowered_without_an_array(tiny_config, tmp_path, mesh):
    before = psutil.Process().memory_info().rss
    plan = StagePlan(llama_7b(tiny_config, tmp_path / "7b"), "finetune", mesh)
    with jax.transfer_guard("disallow_explicit"):  # a mesh that is not here could not hold even a scalar
        assert paths.count(plan.state.params) > 6.7e9
        text = plan.lower().as_text()
    assert "tensor<32x4096x11008xf32>" in text
    assert psutil.Process().memory_info().rss - before < 1 << 30  # the parameters alone would take 27 GB


def test_the_number_of_steps_decides_the_schedule_only(tiny_config, mesh):
    stage = tiny_config.stages.finetune
    stage.steps, stage.schedule = None, stage_config().schedule
    short, long = (StagePlan(tiny_config, "finetune", mesh, steps) for steps in (10, 1000))
    assert (short.steps, StagePlan(tiny_config, "finetune", mesh).steps) == (10, 1)
    assert short.learning_rate(9) < long.learning_rate(9) or long.learning_rate(9) < stage.learning_rate
    assert jax.tree.leaves(short.state) == jax.tree.leaves(long.state)
    assert described(short.frozen) == described(long.frozen)
    assert np.isclose(long.learning_rate(200), stage.learning_rate)  # the end of the warm-up
