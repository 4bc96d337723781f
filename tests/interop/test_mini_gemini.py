"""Mini-Gemini against an independent torch computation: encoders, mining, views, import; tiny and random."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.data.batch import Batch
from mllm_jax.interop.checkpoints import load_connector, load_model
from mllm_jax.interop.composite import read_config
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.models import mllm
from mllm_jax.models.convnext import ConvNext, ConvNextConfig
from mllm_jax.models.encoders import EncodersConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mini_gemini_torch import cells, convnext, mined, visual_tokens  # noqa: E402
from parity_cases import random_tensor  # noqa: E402
from torch_oracle import randomize, save  # noqa: E402

WIDTHS, DEPTHS = (8, 12, 16, 20), (1, 2, 3, 1)
FINE = sum(WIDTHS)
C, D, CLIP_SIZE = 24, 36, 12
TOLERANCE = 1e-5


def trunk_tensors():
    """Random weights in timm's names."""
    shapes = {"stem.0.weight": (WIDTHS[0], 3, 4, 4), "stem.0.bias": (WIDTHS[0],)}
    shapes |= {f"stem.1.{kind}": (WIDTHS[0],) for kind in ("weight", "bias")}
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        here = f"stages.{stage}"
        if stage:
            before = WIDTHS[stage - 1]
            shapes |= {f"{here}.downsample.0.{kind}": (before,) for kind in ("weight", "bias")}
            shapes |= {
                f"{here}.downsample.1.weight": (width, before, 2, 2),
                f"{here}.downsample.1.bias": (width,),
            }
        for block in range(depth):
            name = f"{here}.blocks.{block}"
            shapes |= {f"{name}.conv_dw.weight": (width, 1, 7, 7), f"{name}.conv_dw.bias": (width,)}
            shapes |= {f"{name}.norm.{kind}": (width,) for kind in ("weight", "bias")}
            shapes |= {f"{name}.mlp.fc1.weight": (4 * width, width), f"{name}.mlp.fc1.bias": (4 * width,)}
            shapes |= {f"{name}.mlp.fc2.weight": (width, 4 * width), f"{name}.mlp.fc2.bias": (width,)}
            shapes[f"{name}.gamma"] = (width,)
    return {name: random_tensor(name, shape).astype(np.float32) for name, shape in shapes.items()}


def mining_tensors(width=C):
    """Random weights of mining in Mini-Gemini's names."""
    shapes = {}
    for name, channels in (("query", width), ("aux", FINE), ("val", FINE)):
        name = f"vlm_uni_{name}_projector"
        shapes |= {f"{name}.0.weight": (channels,), f"{name}.0.bias": (channels,)}
        shapes |= {f"{name}.1.weight": (width, channels), f"{name}.1.bias": (width,)}
    return {name: random_tensor(name, shape).astype(np.float32) for name, shape in shapes.items()}


def as_torch(tensors):
    return {name: torch.tensor(value) for name, value in tensors.items()}


def write(directory, tensors, prefix=""):
    """Writes weights under names with a prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    plan = [(prefix + name, np.dtype(x.dtype), x.shape, lambda x=x: x) for name, x in tensors.items()]
    write_sharded(directory, plan)


def timm_config(size):
    return {
        "architecture": "convnext_large",
        "model_args": {"depths": list(DEPTHS), "dims": list(WIDTHS)},
        "pretrained_cfg": {"input_size": [3, size, size], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_the_trunk_equals_torch_and_comes_back(prefix, tmp_path):
    tensors = trunk_tensors()
    beside = {"head.norm.weight": np.ones(20, np.float32)}
    if prefix:
        write(tmp_path / "a", {prefix + n: x for n, x in tensors.items()} | {
            "visual.trunk.head.norm.weight": np.ones(20, np.float32),
            "visual.head.mlp.fc1.weight": np.ones((4, 20), np.float32),
            "transformer.resblocks.0.ln_1.weight": np.ones(4, np.float32),
            "token_embedding.weight": np.ones((4, 4), np.float32),
            "positional_embedding": np.ones((4, 4), np.float32),
            "text_projection": np.ones((4, 4), np.float32),
            "ln_final.bias": np.ones(4, np.float32),
            "logit_scale": np.ones((), np.float32),
        })  # fmt: skip
    else:
        write(tmp_path / "a", tensors | beside)
    (tmp_path / "a" / "config.json").write_text(json.dumps(timm_config(64)))
    config = interop.vision_config(tmp_path / "a")
    assert config == ConvNextConfig(WIDTHS, DEPTHS, 64, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    params = interop.load_vision(tmp_path / "a")
    images = np.random.default_rng(0).integers(0, 256, (2, 72, 64, 3), np.uint8)  # 72 / 32 leaves a remainder
    encoder = ConvNext(config, FeatureRequest(hidden=(1,)))
    found = jax.jit(lambda p: encoder.apply({"params": p}, jnp.asarray(images)))(params)
    assert found.grid == (18, 16)
    normalised = (images / 255 - np.asarray(config.mean)) / np.asarray(config.std)
    pixels = torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float32)
    expected = convnext(as_torch(tensors), pixels, DEPTHS).permute(0, 2, 3, 1).reshape(2, 18 * 16, FINE)
    np.testing.assert_allclose(found.hidden[1], expected, atol=TOLERANCE, rtol=TOLERANCE)

    interop.save_vision(tmp_path / "b", config, params)
    assert interop.vision_config(tmp_path / "b") == config
    jax.tree.map(np.testing.assert_array_equal, interop.load_vision(tmp_path / "b"), params)
    names = {name.removeprefix(prefix) for name in tensors}
    from mllm_jax.interop.source import Source

    assert set(Source(tmp_path / "b")) == names


def test_openclip_describes_the_published_trunk(tmp_path):
    vision = {"timm_model_name": "convnext_large", "timm_pool": "", "timm_proj": "mlp", "image_size": 320}
    fields = {
        "model_cfg": {"embed_dim": 768, "vision_cfg": vision, "text_cfg": {}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(fields))
    config = interop.vision_config(tmp_path)
    assert (config.widths, config.depths) == ((192, 384, 768, 1536), (3, 3, 27, 3))
    assert (config.image_size, config.mean, config.std) == (320, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert read_config(tmp_path)[1].name == "open_clip_config.json"
    vision["timm_model_name"] = "convnext_nano"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"timm_model_name.*convnext_nano.*supported: convnext_tiny"):
        interop.vision_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": {"conv_mlp": True}}, "model_args.conv_mlp=True is not supported"),
        ({"model_args": {"depths": [1, 2], "dims": [8, 12, 16]}}, "has no stages"),
        ({"model_args": {"depths": [10**9] * 2, "dims": [8, 12]}}, "MLLM_JAX_MAX_LAYERS"),
        ({"model_args": {"depths": [1, 1], "dims": [8, 10**9]}}, "MLLM_JAX_MAX_WIDTH"),
        (
            {"pretrained_cfg": {"input_size": [3, 64, 32]}},
            r"pretrained_cfg.input_size=\[3, 64, 32\] is not square",
        ),
        ({"pretrained_cfg": None}, "not a timm configuration"),
    ],
)
def test_settings_of_timm_that_we_do_not_compute_are_refused(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(timm_config(64) | change))
    with pytest.raises(ValueError, match=message):
        interop.vision_config(tmp_path)


def checkpoint(directory, split, overview):
    """A tiny Mini-Gemini checkpoint with its towers beside it; (language model, CLIP, other tensors) in torch."""
    clip = transformers.CLIPVisionConfig(
        hidden_size=C, intermediate_size=37, num_attention_heads=3, num_hidden_layers=3, patch_size=4,
        image_size=CLIP_SIZE,
    )  # fmt: skip
    clip = randomize(transformers.CLIPVisionModel(clip))
    save(clip, directory / "clip")
    write(directory / "convnext", trunk_tensors(), "visual.trunk.")
    (directory / "convnext" / "config.json").write_text(json.dumps(timm_config(64)))
    llm = transformers.LlamaConfig(
        vocab_size=53, hidden_size=D, intermediate_size=31, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    llm = randomize(transformers.LlamaForCausalLM(llm))
    save(llm, directory / "model")
    shapes = {"0.weight": (D, C), "0.bias": (D,), "2.weight": (D, D), "2.bias": (D,)}
    others = {
        f"mm_projector.{n}": random_tensor(n, s).astype(np.float32) for n, s in shapes.items()
    } | mining_tensors()
    tensors = {name: value.numpy() for name, value in llm.state_dict().items()}
    tensors |= {f"model.{name}": value for name, value in others.items()}
    write(directory / "model", tensors)
    fields = json.loads((directory / "model" / "config.json").read_text()) | {
        "model_type": "mgm",
        "mm_vision_tower": "model_zoo/clip",
        "mm_vision_tower_aux": "model_zoo/convnext",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": C,
        "mm_hidden_size_aux": FINE,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "image_size_aux": 96 * split,
        "image_grid": split,
        "image_global": overview,
        "optimize_vision_tower_aux": False,
    }
    (directory / "model" / "config.json").write_text(json.dumps(fields))
    return llm, clip, others


@pytest.mark.parametrize(("split", "overview"), [(1, False), (2, True), (2, False)])
def test_an_imported_checkpoint_computes_what_mini_gemini_does(split, overview, tmp_path):
    llm, clip, others = checkpoint(tmp_path, split, overview)
    model, params, report = load_model(tmp_path / "model")
    views, side = split**2 + overview, 96 * split
    assert isinstance(model.vision, EncodersConfig)
    assert (model.vision.mining, model.vision.views, model.slot_size) == ("selected", views, (side, side))
    assert model.visual_layout.slot.num_tokens == views * 9
    assert not report.ignored or all("block" in why or "norm" in why for why in report.ignored.values())

    images = np.random.default_rng(1).integers(0, 256, (2, side, side, 3), np.uint8)
    spec = Batch.spec(1, length=views * 18 + 8, slots=2, image_size=(side, side), labels=False).empty()
    length = spec.tokens.shape[1]
    tokens = np.zeros((1, length), np.int32)
    places = np.full((1, length), -1, np.int32)
    places[0, 2 : 2 + views * 9], places[0, 4 + views * 9 : 4 + views * 18] = (
        np.arange(views * 9),
        np.arange(views * 9, views * 18),
    )
    tokens[places < 0] = np.arange(3, 3 + (places < 0).sum())
    batch = spec.replace(
        tokens=tokens, visual_index=places, images=images[None], image_mask=np.ones((1, 2), bool),
        positions=np.arange(length, dtype=np.int32)[None], segment_ids=np.ones((1, length), np.int32),
    )  # fmt: skip
    ours = jax.jit(lambda p, b: mllm.apply(model, p, b, method="visual_tokens"))(params, batch)
    logits = jax.jit(lambda p, b: mllm.apply(model, p, b))(params, batch)

    def patches(pixels):
        return clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    first = model.vision.towers[0]
    assert model.vision.towers[1].mean == first.mean  # one processor for both, as in the original
    pixels = (images / 255 - np.asarray(first.mean)) / np.asarray(first.std)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        trunk = as_torch(trunk_tensors())
        expected = visual_tokens(as_torch(others), patches, trunk, DEPTHS, pixels, CLIP_SIZE, split, overview)
        embeddings = llm.get_input_embeddings()(torch.tensor(tokens.astype(np.int64)))
        flat = expected.reshape(-1, D)
        embeddings[0, places[0] >= 0] = flat[places[0][places[0] >= 0]]
        expected_logits = llm(inputs_embeds=embeddings).logits
    scale = float(expected.abs().max())
    np.testing.assert_allclose(ours[0] / scale, flat / scale, atol=TOLERANCE)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=1e-4)


def test_the_connector_of_stage_1_and_what_it_does_not_fit(tmp_path):
    _, _, others = checkpoint(tmp_path, 1, False)
    model, params, _ = load_model(tmp_path / "model")
    stage = {f"model.{name}": torch.tensor(value) for name, value in others.items()}
    torch.save(stage, tmp_path / "mm_projector.bin")
    found = load_connector(tmp_path / "mm_projector.bin", model)
    jax.tree.map(np.testing.assert_array_equal, found, params["connector"])
    plain = mllm.ModelConfig(model.vision.towers[0], model.llm, CLIP_SIZE)
    with pytest.raises(ValueError, match=r"no parameter takes tensor 'model.vlm_uni_[\w.]+'"):
        load_connector(tmp_path / "mm_projector.bin", plain)
    with pytest.raises(ValueError, match=r"model.vision.combine.*'selected' there, '' here"):
        load_connector(tmp_path / "model", plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size_aux": "768"}, "image_size_aux='768' must be a positive whole number"),
        ({"image_size_aux": 80}, "no whole number of fine features per token"),
        ({"image_grid": 0.5}, "image_grid=0.5 must be"),
        ({"image_global": "yes"}, "image_global='yes' must be true or false"),
        ({"image_global": True}, "vision.overview=True needs vision.split > 1"),
        ({"mm_vision_tower_aux": ""}, "image_size_aux=96 is not supported"),
        (
            {"mm_vision_tower": "model_zoo/convnext"},
            "a ConvNeXt 1-2-3-1 x 8-12-16-20, whose maps are no patch tokens",
        ),
    ],
)
def test_entries_that_cannot_be_computed_are_refused_by_name(change, message, tmp_path):
    checkpoint(tmp_path, 1, False)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("huge", [False, True])
def test_mining_equals_torch(huge):
    """Also with logits that overflow, which are made finite."""
    rng = np.random.default_rng(3)
    x, fine = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 9, C), (2, 9, 64, FINE)))
    tensors = mining_tensors()
    if huge:
        tensors["vlm_uni_query_projector.1.weight"] *= 1e37
        tensors["vlm_uni_aux_projector.1.weight"] *= 1e3
    params = {}
    for theirs, ours in (("query", "query"), ("aux", "key"), ("val", "value")):
        scale, bias, kernel, shift = (
            tensors[f"vlm_uni_{theirs}_projector.{n}"] for n in ("0.weight", "0.bias", "1.weight", "1.bias")
        )
        layer = {"kernel": kernel.T, "bias": shift}
        if ours == "query":
            params |= {"query_norm": {"scale": scale, "bias": bias}, "query": layer}
        else:
            params[ours] = {"norm_scale": scale, "norm_bias": bias, **layer}
    from mllm_jax.connectors.mining import Mining

    ours = jax.jit(lambda p: Mining().apply({"params": p}, jnp.asarray(x), jnp.asarray(fine)))(params)
    expected = x + mined(as_torch(tensors), torch.tensor(x), torch.tensor(fine)).numpy()
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert cells(torch.arange(36.0).reshape(1, 1, 6, 6), 3)[0, 1, :, 0].tolist() == [2, 3, 8, 9]
