"""Images that are not square: grids, position tables, connectors and the whole model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from mllm_jax import connectors
from mllm_jax.models import mllm
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.vit import VisionConfig

WIDE = (28, 42)  # 4 x 6 patches of 7 pixels; the position table is of 4 x 4


def model(connector="linear", size=WIDE, **fields):
    return dataclasses.replace(
        tiny.model_config(), image_size=size, connector=connector, connector_options=(), **fields
    )


def test_grids():
    tower = VisionConfig(width=32, depth=2, heads=2, mlp_width=48, patch=7, image_size=28)
    assert (tower.grid(30), tower.grid(*WIDE), tower.grid(42, 27)) == ((4, 4), (4, 6), (6, 3))
    other = dataclasses.replace(tower, patch=14)
    assert EncodersConfig((tower, tower)).grid(*WIDE) == (4, 6)
    with pytest.raises(ValueError, match=r"image_size=\(28, 42\): .* different patch grids"):
        EncodersConfig((tower, other)).grid(*WIDE)


def test_every_patch_becomes_the_visual_token_of_its_place():
    """With hs[0] nothing mixes patches, so pixels of patch (r, c) change token 6 r + c of their slot and no other."""
    config = model(select_layer=0)
    params = tiny.random_params(mllm.abstract_params(config))
    assert config.visual_layout().num_tokens == 24
    batch = tiny.make_batch(config, [tiny.Row(2, 5, 1)], 60)
    assert batch.images.shape == (1, 2, *WIDE, 3)
    tokens = jax.jit(functools.partial(mllm.apply, config, method="visual_tokens"))
    images = batch.images.copy()
    images[0, 1, 14:21, 35:42] ^= 255  # row 2, column 5
    before, after = (tokens(params, each) for each in (batch, batch.replace(images=images)))
    changed = np.flatnonzero(np.asarray(after != before).any(-1)[0])
    assert changed.tolist() == [24 + 2 * 6 + 5]


@pytest.mark.parametrize("connector", sorted(connectors.CONNECTORS))
def test_every_connector_takes_a_wide_image(connector):
    options = {"tokens": 4} if "tokens" in connectors.options(connector) else {}
    config = dataclasses.replace(model(connector), connector_options=tuple(options.items()))
    count = config.visual_layout().num_tokens
    batch = mllm.batch_spec(config, 1, length=8, slots=2)
    params = mllm.abstract_params(config)
    visual = jax.eval_shape(lambda p, b: mllm.apply(config, p, b, method="visual_tokens"), params, batch)
    assert visual.shape == (1, 2 * count, config.llm.width)


def test_the_model_answers_about_wide_and_tall_images():
    """One set of parameters: only the grid differs, and the position table is interpolated to it."""
    wide, tall = model("mlp2x_gelu"), model("mlp2x_gelu", WIDE[::-1])
    params = tiny.random_params(mllm.abstract_params(wide))
    assert jax.tree.map(lambda leaf: leaf.shape, mllm.abstract_params(tall)) == jax.tree.map(np.shape, params)
    for config in (wide, tall):
        batch = tiny.make_batch(config, [tiny.Row(1, 6, 2), tiny.Row(0, 9, 2)], 40)
        run = jax.jit(functools.partial(mllm.apply, config))
        logits = run(params, batch)
        assert np.isfinite(logits).all()
        images = batch.images.copy()
        images[0] ^= 255
        other = np.asarray(run(params, batch.replace(images=images)) != logits)
        assert other[0, 29].any()  # the image reaches the last token of its row
        assert not other[1].any()  # and no other row
