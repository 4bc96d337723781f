"""Every encoder family against transformers (torch), tiny and random: all hidden states, round trip."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.connectors.base import FeatureRequest, collect
from mllm_jax.models.vit import VisionConfig, VisionTransformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity_cases import TOWER_SIZE, TOWERS, pixels  # noqa: E402
from torch_oracle import assert_close, randomize, save, tower_states, vision_states  # noqa: E402


def tower(name):
    """A tiny random torch tower."""
    family, changes = TOWERS[name]
    config = getattr(transformers, f"{family}Config")(**{**TOWER_SIZE, **changes})
    config._attn_implementation = "eager"
    return randomize(getattr(transformers, f"{family}Model")(config))


@pytest.mark.parametrize("name", TOWERS)
def test_every_hidden_state_and_round_trip(name, tmp_path):
    theirs = tower(name)
    save(theirs, tmp_path / "a")
    config, params = interop.vision_config(tmp_path / "a"), interop.load_vision(tmp_path / "a")
    # the trained size, larger, and neither square nor larger everywhere
    for height, width in [(config.image_size,) * 2, (20, 20), (8, 24)]:
        images = pixels(height, width)
        ours, expected = vision_states(config, params, images), tower_states(theirs, images)
        assert len(ours) == len(expected) == 4
        for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert_close(a, b, f"{name} {height}x{width} hs[{k}]")

    interop.save_vision(tmp_path / "b", config, params)
    assert interop.vision_config(tmp_path / "b") == config
    jax.tree.map(np.testing.assert_array_equal, interop.load_vision(tmp_path / "b"), params)
    again, info = type(theirs).from_pretrained(
        tmp_path / "b", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for a, b in zip(tower_states(again, images), expected, strict=True):
        assert_close(a, b, f"{name} export")


def test_features_of_a_truncated_tower(tmp_path):
    save(tower("dinov2-registers"), tmp_path)
    config = interop.vision_config(tmp_path)
    images = pixels(12, 12, batch=1)
    whole = vision_states(config, interop.load_vision(tmp_path), images)
    params = interop.load_vision(tmp_path, depth=2)
    assert params["blocks"]["q"]["kernel"].shape[0] == 2
    request = FeatureRequest(hidden=(1,), means=((0, 1, 2), (2,)), normalized_means=((0, 2),))
    run = jax.jit(lambda p, x: VisionTransformer(config, request).apply({"params": p}, x))
    features = run(params, images)
    expected = collect(request, [state[:, 4:] for state in whole], (3, 3))  # class token and 3 registers
    assert jax.tree.structure(features) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(features), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    with pytest.raises(ValueError, match="4 blocks asked for, the tower has 3"):
        interop.load_vision(tmp_path, depth=4)


def test_geometry_of_the_mini_tower_is_a_siglip(tmp_path):
    config = VisionConfig(
        width=16, depth=2, heads=2, mlp_width=24, patch=4, image_size=12, activation="gelu_tanh", eps=1e-6,
        class_token=False, pre_norm=False, patch_bias=True, mean=(0.4, 0.4, 0.4), std=(0.2, 0.3, 0.2),
    )  # fmt: skip
    model = VisionTransformer(config, FeatureRequest(hidden=(2,)))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))["params"]
    interop.save_vision(tmp_path, config, params, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip_vision_model"
    assert interop.vision_config(tmp_path) == config
    loaded = interop.load_vision(tmp_path)
    assert loaded["pos_embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["pos_embed"], params["pos_embed"].astype(jnp.bfloat16))
    transformers.SiglipVisionModel.from_pretrained(tmp_path)
    assert interop.load_processor_config(tmp_path)["image_mean"] == [0.4, 0.4, 0.4]


def test_a_truncated_tower_is_saved_as_it_is(tmp_path):
    save(tower("siglip"), tmp_path / "a")
    config, params = interop.vision_config(tmp_path / "a"), interop.load_vision(tmp_path / "a", depth=2)
    interop.save_vision(tmp_path / "b", config, params)
    assert interop.vision_config(tmp_path / "b").depth == 2
    jax.tree.map(np.testing.assert_array_equal, interop.load_vision(tmp_path / "b"), params)
    transformers.SiglipVisionModel.from_pretrained(tmp_path / "b")


def test_a_tower_inside_clip_and_siglip(tmp_path):
    text = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    for kind, name in [("CLIP", "clip"), ("Siglip", "siglip")]:
        vision = {**TOWER_SIZE}
        config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text)
        model = randomize(getattr(transformers, f"{kind}Model")(config))
        save(model, tmp_path / name)
        save(model.vision_model, tmp_path / f"{name}-alone")
        inside, alone = (interop.load_vision(tmp_path / d) for d in (name, f"{name}-alone"))
        jax.tree.map(np.testing.assert_array_equal, inside, alone)
        assert interop.vision_config(tmp_path / name) == interop.vision_config(tmp_path / f"{name}-alone")
