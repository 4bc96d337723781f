"""Every connector alone can teach the frozen mini LLM a few captions by heart, and only by looking at the images."""

import dataclasses

import jax
import numpy as np
import pytest

from mllm_jax.connectors import CONNECTORS
from mllm_jax.inference import runs
from mllm_jax.interop import load_tokenizer
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.recipes.mini import mini_config
from mllm_jax.training.opening import open_stage
from mllm_jax.training.params import pretrained_params
from mllm_jax.training.sources import prepare_sources
from mllm_jax.training.step import to_device

SAMPLES, STEPS = 4, 200
TEXT = 112  # tokens of a row beside the image's; a caption has at most 95


@pytest.mark.slow
@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_few_captions_are_learnt_by_heart(connector, tmp_path):
    config = mini_config(connector)
    config.model.vision.image_size = 56
    stage = config.stages.pretrain
    stage.samples_per_row, stage.image_slots = 1, 1
    stage.batch_size = stage.sources.captions.count = SAMPLES
    stage.warmup_ratio = 0.03
    stage.steps, stage.epochs = STEPS, None
    model = runs.model_config(config)
    stage.seq_len = TEXT + model.visual_layout.most_tokens
    tokenizer, params = load_tokenizer(config.model.llm.path), pretrained_params(config, model)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    sources = prepare_sources(config, "pretrain", model, tokenizer, tmp_path)
    plan, batches = open_stage(config, "pretrain", model, tokenizer, params, sources, None, tmp_path, mesh)
    with batches:
        arrays = next(batches).arrays
    others = dataclasses.replace(arrays, images=np.roll(arrays.images, 1, axis=0))
    batch, others = to_device(arrays, mesh), to_device(others, mesh)
    state, frozen = plan.create_state(params), plan.place_frozen(params)
    for _ in range(STEPS):
        state, metrics = plan.step(state, frozen, batch)
    _, wrong = plan.step(state, frozen, others)
    assert metrics["loss"] < 0.2
    assert wrong["loss"] > 1  # it is the images that tell the captions
