"""Fused towers: hidden states side by side, aligned at the ends."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mllm_jax
from mllm_jax import interop
from mllm_jax.cli.main import main
from mllm_jax.config import ConfigError
from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.inference import runs
from mllm_jax.interop import native, recorded
from mllm_jax.interop.checkpoints import load_model, save_llava_hf
from mllm_jax.interop.towers import blocks_of
from mllm_jax.models import mllm
from mllm_jax.models.convnext import ConvNext, ConvNextConfig
from mllm_jax.models.encoders import Encoders, EncodersConfig, vision_encoder
from mllm_jax.models.paths import count
from mllm_jax.models.vit import VisionConfig, VisionTransformer

SIGLIP = VisionConfig(
    width=12, depth=4, heads=2, mlp_width=10, patch=4, image_size=8, activation="gelu_tanh", eps=1e-6,
    class_token=False, pre_norm=False, patch_bias=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
DINO = VisionConfig(
    width=8, depth=2, heads=2, mlp_width=16, patch=4, image_size=12, activation="gelu", eps=1e-6, pre_norm=False,
    patch_bias=True, layer_scale=True,
)  # fmt: skip
FUSED = EncodersConfig((SIGLIP, DINO))
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
        Encoders(config, FeatureRequest(hidden=(1,))).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, shapes)


def test_towers_with_other_patches_and_undefined_requests_are_refused():
    other = EncodersConfig(
        (SIGLIP, VisionConfig(width=8, depth=2, heads=2, mlp_width=8, patch=3, image_size=12))
    )
    with pytest.raises(ValueError, match="different patch grids"):
        other.grid(12)
    request = FeatureRequest(hidden=(1,), normalized_means=((0, 1),))
    with pytest.raises(ValueError, match=r"dci.learnable is not defined"):
        jax.eval_shape(Encoders(FUSED, request).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_tokens_of_one_behind_those_of_the_other():
    """Encoders of one width and any grids; the connector is one that treats each patch alone."""
    wide = dataclasses.replace(DINO, width=SIGLIP.width)
    config = EncodersConfig((SIGLIP, wide), (8, 16), "tokens")
    assert (config.width, config.depth, config.grid(16)) == (12, 2, (1, 4 + 16))
    request = FeatureRequest(hidden=(1,), means=((0, 1),), normalized_means=((1,),))
    images = jnp.asarray(np.random.RandomState(1).randint(0, 256, (2, 16, 16, 3)), jnp.uint8)
    params = jax.jit(Encoders(config, request).init)(jax.random.key(0), images)["params"]
    found = jax.jit(lambda p: vision_encoder(config, request).apply({"params": p}, images))(params)
    alone = FeatureRequest(hidden=(1,), means=((0, 1),), normalized_means=((1,),))
    second = vision_encoder(wide, alone).apply({"params": params["tower_1"]}, images)
    halved = np.asarray(images, np.float32).reshape(2, 8, 2, 8, 2, 3).mean(axis=(2, 4))
    halved = (halved / 255 - np.asarray(SIGLIP.mean)) / np.asarray(SIGLIP.std)
    ends = FeatureRequest(hidden=(3,), means=((2, 3),), normalized_means=((3,),))
    first = vision_encoder(SIGLIP, ends).apply(
        {"params": params["tower_0"]}, jnp.asarray(halved, jnp.float32)
    )
    for ours, a, b in (
        (found.hidden[1], first.hidden[3], second.hidden[1]),
        (found.means[0], first.means[0], second.means[0]),
        (found.normalized_means[0], first.normalized_means[0], second.normalized_means[0]),
    ):
        np.testing.assert_allclose(ours, np.concatenate([a, b], axis=1), atol=1e-5)
    with pytest.raises(ValueError, match="encoders of one width, not of 12, 8 channels"):
        EncodersConfig((SIGLIP, DINO), combine="tokens").grid(8)
    model = mllm.ModelConfig(config, tiny.model_config().llm, 16, connector="mlp2x_gelu")
    assert model.visual_layout.slot.num_tokens == 20
    with pytest.raises(ValueError, match=r"'c_abstractor'.*vision.combine='tokens'"):
        dataclasses.replace(model, connector="c_abstractor").make_connector()


@pytest.mark.slow
def test_a_run_of_two_towers(train, tiny_config, tmp_path, capsys):
    """By config: one update with one tower frozen and one trained; exported and read back in every form."""
    paths = []
    for name, config in (("siglip", SIGLIP), ("dino", DINO)):
        config = dataclasses.replace(config, patch=7, image_size=28)
        model = VisionTransformer(config, FeatureRequest(hidden=(config.depth,)))
        params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 28, 28, 3)))["params"]
        interop.save_vision(tmp_path / name, config, params)
        paths.append(str(tmp_path / name))
    recipe = tiny_config
    recipe.model.vision.path = "+".join(paths)
    recipe.model.vision.select_layer = -2
    recipe.stage_order = ("finetune",)
    del recipe.stages["pretrain"]
    recipe.stages.finetune.trainable = ("connector/.*", "vision/tower_1/.*")
    recipe.stages.finetune.steps = recipe.stages.finetune.accumulation = 1
    recipe.stages.finetune.warmup_ratio = 0.0  # the first update of a warm-up has rate 0
    trained = jax.device_get(train.train(recipe, tmp_path / "run", evaluate=False))

    before = interop.load_vision(recipe.model.vision.path, depth=1)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained["vision"], before)
    assert not any(jax.tree.leaves(changed["tower_0"]))
    assert all(changed["tower_1"]["blocks"][name]["kernel"] for name in ("q", "k", "v", "out", "fc1", "fc2"))

    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    for form in ("safetensors", "orbax", "vision"):
        command = ["export", "--from", str(tmp_path / "run"), "--to", str(tmp_path / form), "--format", form]
        assert main(command) == 0
    for form in ("safetensors", "orbax"):
        model, params, _ = load_model(tmp_path / form)
        assert isinstance(model.vision, EncodersConfig)
        assert hash(model) == hash(load_model(tmp_path / form)[0])
        same(params, trained)
        assert interop.vision_config(tmp_path / form) == model.vision
        same(interop.load_vision(tmp_path / form, depth=1), trained["vision"])
        shallow = interop.load_vision(tmp_path / form, depth=0)
        assert [blocks_of(shallow[f"tower_{i}"]) for i in (0, 1)] == [2, 0]
    parts = f"{tmp_path / 'vision' / 'tower_0'}+{tmp_path / 'vision' / 'tower_1'}"
    same(interop.load_vision(parts), trained["vision"])
    for source in ("run", "orbax"):
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / source), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["parameters"] == count(trained)
        assert {"vision/tower_0", "vision/tower_1"} <= found["geometry"].keys()
        assert found["geometry"]["vision"] == {}  # besides its towers all is as by default
        assert "vision/tower_1/blocks/q" in {row["module"] for row in found["modules"]}
    assert main(["export", "--from", str(tmp_path / "run"), "--to", str(tmp_path / "hf")]) == 1
    assert "transformers' LLaVA has one vision tower" in capsys.readouterr().err


def test_a_convnext_alone(tmp_path):
    """It is an encoder like the others: kept and read again, and refused by name where there is no place for it."""
    vision = ConvNextConfig((6, 10), (1, 2), 32)
    model = dataclasses.replace(
        tiny.model_config(), vision=vision, image_size=32, connector="mlp2x_gelu", connector_options=()
    )
    params = tiny.random_params(mllm.abstract_params(model))
    native.save_native(tmp_path / "ours", model, params)
    kept = interop.load_vision(tmp_path / "ours", depth=1)
    jax.tree.map(np.testing.assert_array_equal, kept, params["vision"])
    with pytest.raises(ValueError, match="no class for the vision tower ConvNeXt 1-2 x 6-10"):
        save_llava_hf(tmp_path / "hf", model, params)
    fields = {"model_type": "llava_llama", "mm_vision_tower": "clip", "mm_vision_select_layer": -1}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"model\.connector\.name: 'linear' there, 'mlp2x_gelu' here"):
        recorded.check(tmp_path / "theirs", model)


@pytest.mark.slow
def test_a_run_that_mines_fine_features(train, tiny_config, tmp_path):
    """By config: mining trains with the connector, its ConvNeXt stays frozen; the export answers as the run does."""
    clip = VisionConfig(width=12, depth=2, heads=2, mlp_width=10, patch=7, image_size=28)
    narrow = ConvNextConfig((6, 10), (1, 2), 32)
    for name, config, module in (("clip", clip, VisionTransformer), ("narrow", narrow, ConvNext)):
        model = module(config, FeatureRequest(hidden=(config.depth,)))
        params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 64, 64, 3)))["params"]
        interop.save_vision(tmp_path / name, config, params)
    recipe = tiny_config
    recipe.model.vision.path = f"{tmp_path / 'clip'}+{tmp_path / 'narrow'}"
    recipe.model.vision.combine = "mining"
    recipe.model.vision.image_size, recipe.model.vision.image_sizes = 64, (28, 64)
    recipe.stage_order = ("pretrain",)
    del recipe.stages["finetune"]
    recipe.stages.pretrain.steps = recipe.stages.pretrain.accumulation = 1
    recipe.stages.pretrain.warmup_ratio = 0.0  # the first update of a warm-up has rate 0
    trained = jax.device_get(train.train(recipe, tmp_path / "run", evaluate=False))
    model = runs.model_config(recipe)
    fresh = jax.device_get(mllm.init(model, jax.random.key(recipe.seed)))["connector"]["mining"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained["connector"]["mining"], fresh)
    assert changed["query"]["kernel"]
    assert changed["key"]["kernel"]
    assert changed["value"]["kernel"]
    before = interop.load_vision(
        recipe.model.vision.path, depth=model.vision_spec.select_layer, whole=model.vision
    )
    jax.tree.map(np.testing.assert_array_equal, trained["vision"], before)

    command = [
        "export",
        "--from",
        str(tmp_path / "run"),
        "--to",
        str(tmp_path / "out"),
        "--format",
        "safetensors",
    ]
    assert main(command) == 0
    image = np.random.RandomState(3).randint(0, 256, (40, 70, 3)).astype(np.uint8)
    answers = [
        mllm_jax.load(tmp_path / name).likelihood(image, "What is this?", ["A cat.", "A dog."])
        for name in ("run", "out")
    ]
    np.testing.assert_array_equal(*answers)

    recipe.stages.pretrain.cache_features = True
    train.train(recipe, tmp_path / "cached", evaluate=False)
    (key,) = (tmp_path / "cached" / "data" / "features").glob("*/key.json")
    assert json.loads(key.read_text())["maps"] == [[1, 16 * 16, 6], [1, 8 * 8, 10]]
    plain, cached = (
        read_metrics(tmp_path / name / "metrics.jsonl")["pretrain"] for name in ("run", "cached")
    )
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(cached[0][name], plain[0][name], rtol=1e-5)
    recipe.stages.pretrain.cache_features = False
    recipe.model.vision.path = str(tmp_path / "clip")
    with pytest.raises(
        ConfigError, match=r"'model.vision.image_sizes' and 'model.vision.combine': for several"
    ):
        runs.model_config(recipe)
