"""Fused towers: hidden states side by side, aligned at the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.models.fused import FusedVision, FusedVisionConfig, vision_encoder
from mllm_jax.models.vit import VisionConfig, VisionTransformer

SIGLIP = VisionConfig(
    width=12, depth=4, heads=2, mlp_width=10, patch=4, image_size=8, activation="gelu_tanh", eps=1e-6,
    class_token=False, pre_norm=False, patch_bias=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
DINO = VisionConfig(
    width=8, depth=2, heads=2, mlp_width=16, patch=4, image_size=12, activation="gelu", eps=1e-6, pre_norm=False,
    patch_bias=True, layer_scale=True,
)  # fmt: skip
FUSED = FusedVisionConfig((SIGLIP, DINO))
IMAGES = jnp.asarray(np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3)), jnp.uint8)


def encode(config, request, params):
    """Features of the test pictures."""
    return jax.jit(lambda p: vision_encoder(config, request).apply({"params": p}, IMAGES))(params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Both towers on disk."""
    root = tmp_path_factory.mktemp("towers")
    for name, config in (("siglip", SIGLIP), ("dino", DINO)):
        model = VisionTransformer(config, FeatureRequest(hidden=(config.depth,)))
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
        interop.save_vision(root / name, config, params)
    return f"{root}/siglip+{root}/dino"


def test_states_side_by_side(saved):
    config = interop.vision_config(saved)
    assert config == FUSED
    assert (config.width, config.depth, config.grid(8)) == (20, 2, (2, 2))
    layer = config.resolve_layer(-2)
    assert layer == 1
    params = interop.load_vision(saved, depth=layer)
    assert [len(params[f"tower_{i}"]["blocks"]["q"]["kernel"]) for i in (0, 1)] == [3, 1]  # no deeper blocks
    features = encode(config, FeatureRequest(hidden=(1,), means=((0, 1),)), params)
    siglip = encode(SIGLIP, FeatureRequest(hidden=(3,), means=((2, 3),)), params["tower_0"])
    dino = encode(DINO, FeatureRequest(hidden=(1,), means=((0, 1),)), params["tower_1"])
    assert features.hidden[1].shape == (2, 4, 20)
    expected = np.concatenate([siglip.hidden[3], dino.hidden[1]], axis=-1)
    np.testing.assert_allclose(features.hidden[1], expected, atol=1e-6)
    expected = np.concatenate([siglip.means[0], dino.means[0]], axis=-1)
    np.testing.assert_allclose(features.means[0], expected, atol=1e-6)
    shapes = jax.eval_shape(
        FusedVision(config, FeatureRequest(hidden=(1,))).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)


def test_towers_with_other_patches_and_undefined_requests_are_refused():
    other = FusedVisionConfig(
        (SIGLIP, VisionConfig(width=8, depth=2, heads=2, mlp_width=8, patch=3, image_size=12))
    )
    with pytest.raises(ValueError, match="different patch grids"):
        other.grid(12)
    request = FeatureRequest(hidden=(1,), normalized_means=((0, 1),))
    with pytest.raises(ValueError, match=r"dci.learnable is not defined"):
        jax.eval_shape(FusedVision(FUSED, request).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
