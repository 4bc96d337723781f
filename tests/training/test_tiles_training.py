"""Images in tiles through both stages of a recipe: features kept by tile, a newline frozen and trained, then asked."""

import json
import pathlib

import numpy as np
import pytest
import tiny

import mllm_jax
from mllm_jax.config import ConfigError
from mllm_jax.data.anyres import Tiles
from mllm_jax.inference import runs
from mllm_jax.training.optimizer import peak_rates

SIZES = [(28, 28), (30, 75), (70, 20), (56, 56)]


@pytest.fixture
def config(tiny_checkpoints, tmp_path):
    """A recipe on data of its own: images of many sizes."""
    tiny_config = tiny.recipe(tiny_checkpoints, tiny.write_data(tmp_path / "data"))
    tiny_config.model.tiles.merge = "spatial_unpad"
    tiny_config.model.tiles.max_tiles = 1
    tiny_config.model.tiles.several = "whole"
    tiny_config.data.image_slots = 10
    tiny_config.data.seq_len = 128
    for name, stage in tiny_config.stages.items():
        stage.steps, stage.samples_per_row = 2, 2
        (source,) = stage.sources.values()
        entries = json.loads(pathlib.Path(source.json).read_text())
        for number, entry in enumerate(entries):
            names = entry.get("image", [])
            for k, image in enumerate([names] if isinstance(names, str) else names):
                data = tiny.png(100 * len(name) + 10 * number + k, SIZES[number % 4])
                (pathlib.Path(source.images) / image).write_bytes(data)
    tiny_config.stages.pretrain.cache_features = True
    tiny_config.stages.finetune.trainable = ("connector/.*", "separators/newline", "llm/.*")
    tiny_config.stages.finetune.learning_rates = (("separators/.*", 0.05),)
    return tiny_config


@pytest.mark.slow
def test_both_stages_and_asking(config, train, tmp_path):
    run = tmp_path / "run"
    train.train(config, run, evaluate=False)
    model = runs.model_config(config)
    assert model.tiles == Tiles(max_tiles=1, several="whole")
    fresh, trained = (
        np.asarray(runs.stage_params(run / "params" / stage, model)["separators"]["newline"])
        for stage in ("pretrain", "finetune")
    )
    assert 0.5 < np.std(fresh) * model.llm.width**0.5 < 1.5  # as it began
    assert 0.01 < np.abs(trained - fresh).max() < 0.2  # at a rate of its own
    loaded = mllm_jax.load(run)
    images = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i, size in enumerate(SIZES)]
    prompts = ["what?"] * 4
    together = loaded.generate(images, prompts, max_new_tokens=3)
    assert together == [loaded.generate(image, "what?", max_new_tokens=3) for image in images]
    states = loaded.hidden_states(images[1], "what?")
    assert states.visual.shape[0] == 3 + 1  # two tiles and the whole image, in a power of two of slots


def test_rates_name_the_newline():
    params = {"separators": {"newline": np.zeros(4)}, "llm": {"embedding": np.zeros((4, 4))}}
    rates = peak_rates(params, 1e-5, (("separators/newline", 1e-3),))
    assert rates == {"separators": {"newline": 1e-3}, "llm": {"embedding": 1e-5}}


def refused(config, message):
    with pytest.raises(ConfigError, match=message):
        runs.model_config(config)


def test_impossible_combinations_are_refused_by_name(config):
    runs.model_config(config)
    config.data.image_slots = 4
    refused(config, r"'data.image_slots' is 4, but an image in tiles fills up to 5 slots")
    config.stages.pretrain.image_slots = 10
    config.stages.finetune.image_slots = 3
    refused(config, r"'stages.finetune.image_slots' is 3")
    config.stages.finetune.image_slots = None
    config.data.image_slots = 10
    config.model.connector.name = "q_former"
    config.model.connector.q_former.update({"tokens": 4, "hidden": 8, "depth": 1, "heads": 2, "mlp": 8})
    refused(config, "choose 'flat'")
    config.model.tiles.merge = "flat"
    refused(config, "tiles.max_tiles=1 is of merge='spatial_unpad'")
    config.model.tiles.max_tiles = 0
    assert not runs.model_config(config).visual_layout.separated
    config.model.tiles.merge = "none"
    assert runs.model_config(config).tiles is None
