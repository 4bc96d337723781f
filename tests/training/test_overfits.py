"""Every connector alone can teach the frozen mini LLM a few captions by heart, and only by looking at the images."""

import dataclasses

import jax
import numpy as np
import pytest

from mllm_jax.connectors import CONNECTORS
from mllm_jax.inference import runs
from mllm_jax.interop import load_tokenizer
from mllm_jax.models import paths
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.recipes.mini import mini_config
from mllm_jax.training.optimizer import make_optimizer
from mllm_jax.training.params import place, pretrained_params
from mllm_jax.training.sources import prepare_sources, stage_iterator
from mllm_jax.training.step import init_state, make_train_step, state_shardings, to_device, with_shardings

SAMPLES, STEPS = 3, 200
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
    model = runs.model_config(config)
    stage.seq_len = TEXT + model.visual_layout.most_tokens
    tokenizer = load_tokenizer(config.model.llm.path)
    sources = prepare_sources(config, "pretrain", model, tokenizer, tmp_path)
    with stage_iterator(config, stage, model, tokenizer, sources) as batches:
        arrays = next(batches).arrays
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    others = dataclasses.replace(arrays, images=np.roll(arrays.images, 1, axis=0))
    batch, others = to_device(arrays, mesh), to_device(others, mesh)

    trained, frozen = paths.split(pretrained_params(config, model), stage.trainable)
    optimizer, _ = make_optimizer(stage, trained, STEPS)
    state = init_state(place(trained, mesh, "float32", model), optimizer)
    frozen = place(frozen, mesh, "float32", model)
    shapes = with_shardings(state, state_shardings(state, mesh, model))
    labels = int(np.count_nonzero(arrays.loss_weights))
    step = make_train_step(
        model, optimizer, shapes, frozen, batch, label_tokens=labels, accumulation=1, seed=0
    )
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
    _, wrong = step(state, frozen, others)
    assert metrics["loss"] < 0.2
    assert wrong["loss"] > 1  # it is the images that tell the captions
