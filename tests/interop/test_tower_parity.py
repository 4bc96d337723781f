"""Towers and LLMs against transformers (torch) on tiny random checkpoints: all hidden states and logits."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.models.decoder import Decoder, DecoderConfig, init_cache
from mllm_jax.models.vit import VisionConfig, VisionTransformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VISION = {"hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 3, "num_hidden_layers": 3}
LLAMA = {
    "vocab_size": 53,
    "hidden_size": 36,
    "intermediate_size": 31,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def randomize(model, seed=0):
    """Random values everywhere, so that biases, norms and tables all count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model.eval()


def save(model, directory):
    """Saves without the progress bar's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)


def tower(kind, **changes):
    """A tiny random torch tower."""
    fields = {**VISION, "image_size": 12, "patch_size": 4, **changes}
    if kind == "clip":
        return randomize(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields)))
    return randomize(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**fields)))


def our_states(config, params, images, depth):
    """All hidden states hs[0..depth], class token kept."""
    model = VisionTransformer(config, FeatureRequest(hidden=tuple(range(depth + 1))))
    features = model.apply({"params": params}, jnp.asarray(images), keep_prefix=True)
    return [features.hidden[k] for k in range(depth + 1)]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (20, 20), (8, 24), (14, 14)])
def test_every_hidden_state(kind, height, width, tmp_path):
    theirs = tower(kind, image_size=14 if height == 14 else 12)
    save(theirs, tmp_path)
    images = np.random.default_rng(0).standard_normal((2, height, width, 3)).astype(np.float32)
    config = interop.vision_config(tmp_path)
    native = height == width == config.image_size
    with torch.no_grad():
        out = theirs(
            torch.tensor(images.transpose(0, 3, 1, 2)),
            output_hidden_states=True,
            interpolate_pos_encoding=not native,
        )
    ours = our_states(config, interop.load_vision(tmp_path), images, 3)
    assert len(out.hidden_states) == 4
    for k, (a, b) in enumerate(zip(ours, out.hidden_states, strict=True)):
        np.testing.assert_allclose(a, b.numpy(), atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"hs[{k}]")


def test_truncated_tower_equals_the_whole_one(tmp_path):
    save(tower("clip"), tmp_path)
    config = interop.vision_config(tmp_path)
    images = np.random.default_rng(1).standard_normal((1, 12, 12, 3)).astype(np.float32)
    whole = our_states(config, interop.load_vision(tmp_path), images, 3)
    params = interop.load_vision(tmp_path, depth=2)
    assert params["blocks"]["q"]["kernel"].shape[0] == 2
    request = FeatureRequest(hidden=(1,), means=((0, 1, 2), (2,)))
    features = VisionTransformer(config, request).apply({"params": params}, jnp.asarray(images))
    states = [state[:, 1:] for state in whole]
    np.testing.assert_allclose(features.hidden[1], states[1], atol=1e-6)
    np.testing.assert_allclose(features.means[0], sum(states[:3]) / 3, atol=1e-6)
    np.testing.assert_allclose(features.means[1], states[2], atol=1e-6)
    with pytest.raises(ValueError, match="4 blocks asked for, the tower has 3"):
        interop.load_vision(tmp_path, depth=4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_saved_tower_loads_in_transformers(kind, tmp_path):
    source, copy = tmp_path / "a", tmp_path / "b"
    theirs = tower(kind)
    save(theirs, source)
    params, config = interop.load_vision(source), interop.vision_config(source)
    interop.save_vision(copy, config, params)
    cls = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}[kind]
    again, info = cls.from_pretrained(copy, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for a, b in zip(
            theirs(images, output_hidden_states=True).hidden_states,
            again(images, output_hidden_states=True).hidden_states,
            strict=True,
        ):
            assert torch.equal(a, b)
    assert interop.vision_config(copy) == config
    jax.tree.map(np.testing.assert_array_equal, interop.load_vision(copy), params)


def test_geometry_of_the_mini_tower_is_a_siglip(tmp_path):
    config = VisionConfig(
        width=16, depth=2, heads=2, mlp_width=24, patch=4, image_size=12, activation="gelu_tanh", eps=1e-6,
        class_token=False, pre_norm=False, patch_bias=True, mean=(0.4, 0.4, 0.4), std=(0.2, 0.3, 0.2),
    )  # fmt: skip
    model = VisionTransformer(config, FeatureRequest(hidden=(2,)))
    params = model.init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))["params"]
    interop.save_vision(tmp_path, config, params, dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip_vision_model"
    assert interop.vision_config(tmp_path) == config
    loaded = interop.load_vision(tmp_path)
    assert loaded["pos_embed"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["pos_embed"], params["pos_embed"].astype(jnp.bfloat16))
    transformers.SiglipVisionModel.from_pretrained(tmp_path)


def llama(**changes):
    """A tiny random Llama."""
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})))


def our_decoder_states(config, params, tokens, segments=None):
    """Final-normed hidden states and logits."""
    tokens = jnp.asarray(tokens)
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def run(decoder):
        hidden, _ = decoder(decoder.embed(tokens), positions, segments)
        return hidden, decoder.logits(hidden)

    return Decoder(config).apply({"params": params}, method=run)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 10}, {"num_key_value_heads": 6}]
)
def test_llama_parity(changes, tmp_path):
    theirs = llama(**changes)
    save(theirs, tmp_path)
    config, params = interop.llm_config(tmp_path), interop.load_llm(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 53, (2, 11))
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), output_hidden_states=True)
    for k in range(4):  # the model cut after k blocks gives hidden state k, before the final norm
        cut = {**params, "blocks": jax.tree.map(lambda x, k=k: x[:k], params["blocks"])}
        state = out.hidden_states[k]
        expected = theirs.model.norm(state) if k < 3 else state
        if k:
            hidden, logits = our_decoder_states(DecoderConfig(**{**vars(config), "depth": k}), cut, tokens)
            np.testing.assert_allclose(hidden, expected.detach().numpy(), atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(logits, out.logits.numpy(), atol=TOLERANCE, rtol=TOLERANCE)


def test_cached_decoding_equals_the_whole_pass(tmp_path):
    save(llama(), tmp_path)
    config, params = interop.llm_config(tmp_path), interop.load_llm(tmp_path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 53, (2, 9)))
    hidden, _ = our_decoder_states(config, params, tokens)
    cache = init_cache(config, 2, 12, jnp.float32)

    def step(decoder, tokens, positions, cache):
        return decoder(decoder.embed(tokens), positions, jnp.ones_like(tokens), cache)

    parts = []
    for start, end in [(0, 4), (4, 5), (5, 6), (6, 9)]:
        positions = jnp.broadcast_to(jnp.arange(start, end), (2, end - start))
        out, cache = Decoder(config).apply(
            {"params": params}, tokens[:, start:end], positions, cache, method=step
        )
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), hidden, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_llm_loads_in_transformers(tied, tmp_path):
    source, copy = tmp_path / "a", tmp_path / "b"
    theirs = llama(tie_word_embeddings=tied)
    save(theirs, source)
    params, config = interop.load_llm(source), interop.llm_config(source)
    assert ("head" in params) != tied
    interop.save_llm(copy, config, params)
    again = transformers.LlamaForCausalLM.from_pretrained(copy)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, again(tokens).logits)
    assert interop.llm_config(copy) == config
    jax.tree.map(np.testing.assert_array_equal, interop.load_llm(copy), params)
