"""Attention maps: the weights are those that NumPy computes, and a token's weight is where its part of the image is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax import connectors
from mllm_jax.data.anyres import AnyRes, Tiles
from mllm_jax.data.layout import Slot, VisualLayout, WholeImage
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.video_layout import Video, WithVideo
from mllm_jax.inference.attention_maps import AttentionMaps
from mllm_jax.inference.model import Model
from mllm_jax.models import mllm

WINDOWS, SOFTCAP = (0, 5), 3.0


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    llm = dataclasses.replace(tiny_model.llm, windows=WINDOWS, attention_softcap=SOFTCAP)
    config = dataclasses.replace(tiny_model, llm=llm)
    params = jax.tree.map(lambda leaf: 2 * leaf, tiny.random_params(mllm.abstract_params(config)))
    return Model(config, params, tiny_tokenizer, ImageProcessor.clip(tiny.IMAGE_SIZE), "vicuna_v1")


def numpy_weights(model, states, layer):
    """[T, T], the mean over heads, from what goes into a block."""
    llm, params = model.config.llm, model.params["llm"]["blocks"]
    x = states.llm[layer].astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + llm.eps) * params["norm1"]["scale"][layer]
    length, half = len(x), llm.head_width // 2
    angles = np.arange(length)[:, None] / llm.rope_theta ** (np.arange(half) / half)

    def heads(name, count):
        y = (x @ params[name]["kernel"][layer]).reshape(length, count, 2, half)
        first, second = y[:, :, 0], y[:, :, 1]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    q, k = heads("q", llm.heads), heads("k", llm.kv_heads).repeat(llm.heads // llm.kv_heads, axis=1)
    logits = SOFTCAP * np.tanh(np.einsum("thd,shd->hts", q, k) / np.sqrt(llm.head_width) / SOFTCAP)
    behind = np.arange(length)[:, None] - np.arange(length)
    seen = (behind >= 0) & (behind < (WINDOWS[layer] or length))
    weights = np.where(seen, np.exp(logits), 0)
    return (weights / weights.sum(-1, keepdims=True)).mean(0)


def test_weights_are_those_of_numpy(model):
    images, history, answer = [tiny.png(0), tiny.png(1)], [("how?", "so")], "a naïve cat"
    maps = model.attention_maps(images, "what?", answer, history=history)
    assert "".join(maps.pieces) == answer
    prompt = "what is <image> and <image>?"
    maps = model.attention_maps(images, prompt, answer)
    states = model.hidden_states(images, prompt, answer)
    visual = states.image_of >= 0
    close = len(states.tokens) - len(maps.tokens) - 1  # the position before the answer; </s> is behind it
    np.testing.assert_array_equal(states.tokens[close:][: len(maps.tokens)], maps.tokens)
    assert maps.weights.shape == (2, len(maps.tokens), 8)
    for layer in range(2):
        expected = numpy_weights(model, states, layer)[close - 1 :][: len(maps.tokens), visual]
        np.testing.assert_allclose(maps.weights[layer], expected, rtol=2e-4, atol=1e-6)
    assert maps.weights[0].sum() > 1e-2 > maps.weights[1].sum()  # no image is in the window of 5

    assert [(view.image, view.kind, view.pixels.shape) for view in maps.views] == [
        (index, "image", (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)) for index in range(2)
    ]
    (first, second), weights = maps.on_views(maps.weights), maps.weights.reshape(2, -1, 2, 2, 2)
    np.testing.assert_array_equal(first, weights[:, :, 0])
    np.testing.assert_array_equal(second, weights[:, :, 1])
    with pytest.raises(ValueError, match="no text"):
        model.attention_maps(images[0], "what?", " ")


def maps_of(*layouts, grid, patches=None):
    """Maps of layouts alone, for their `on_views`."""
    counts = [layout.num_tokens for layout in layouts]
    return AttentionMaps(
        tokens=np.zeros(0, np.int32), pieces=(), weights=np.zeros((0, 0, sum(counts)), np.float32),
        image_of=np.repeat(np.arange(len(counts), dtype=np.int32), counts), views=(), place="grid",
        _layouts=layouts, _grid=grid, _patches=patches,
    )  # fmt: skip


def test_tiles_are_put_together():
    rule = AnyRes(Slot(6 * 6, size=(60, 60)), Tiles(pinpoints=((2, 1),)), grid=(6, 6))
    layout = rule(lambda: (60, 90))  # 90 of the 120 columns are covered: the middle 9 of 12
    maps = maps_of(layout, grid=(6, 6))
    each = np.eye(layout.num_tokens, dtype=np.float32)
    whole, tiles = maps.on_views(each)
    assert whole.shape[1:] == (6, 6)
    assert tiles.shape[1:] == (6, 12)
    assert whole.reshape(len(each), -1)[:36].argmax(-1).tolist() == list(range(36))
    rows = tiles[36:].reshape(6, -1, 6, 12)  # each with a newline behind it
    width = rows.shape[1] - 1
    for row in range(6):
        assert not rows[row, -1].any()
        for column in range(width):
            assert np.argwhere(rows[row, column]).tolist() == [[row, (12 - width) // 2 + column]]


def test_frames_shrunk_tokens_and_learned_queries():
    image = WholeImage(Slot(4, size=(20, 20)))
    video = WithVideo(image, Video(frames=2, pool="average2d", window=2, newline="frame"), grid=(2, 2))
    both = maps_of(video(lambda: (20, 20)), video.of_video(9), grid=(2, 2))
    weights = np.asarray(
        [1, 2, 3, 4, 8, 100, 4, 100], np.float32
    )  # an image; two frames of one token and a newline
    picture, first, second = both.on_views(weights)
    assert picture.tolist() == [[1, 2], [3, 4]]
    assert (first.tolist(), second.tolist()) == ([[2, 2], [2, 2]], [[1, 1], [1, 1]])

    patches = np.asarray([[[1, 0, 0, 0], [0, 0, 0.5, 0.5]]], np.float32)  # of two queries on four patches
    queries = maps_of(VisualLayout((Slot(2),), range(2)), grid=(2, 2), patches=patches)
    (heat,) = queries.on_views(np.asarray([3, 4], np.float32))
    assert heat.tolist() == [[3, 0], [2, 2]]


SMALL = {
    "q_former": {"tokens": 3, "hidden": 8, "depth": 3, "heads": 2, "mlp": 8},
    "resampler": {"tokens": 3, "hidden": 8, "depth": 1, "heads": 2, "mlp": 8, "end_tokens": 2},
    "perceiver": {"tokens": 3, "depth": 1, "heads": 2, "head_width": 4},
    "d_abstractor": {"tokens": 4, "hidden": 8, "depth": 1, "heads": 2, "mlp": 8},
}


@pytest.mark.parametrize("name", SMALL)
def test_connectors_without_a_grid_keep_their_attention(name):
    vision = connectors.VisionSpec(width=6, depth=2, select_layer=1, grid=(3, 3))
    connector = connectors.create(name, vision, 8, SMALL[name])
    assert connector.token_grid(vision.grid) is None
    state = jax.random.normal(jax.random.key(0), (2, 9, 6))
    features = connectors.collect(connector.request(), [state] * 2, vision.grid)
    params = jax.jit(connector.init)(jax.random.key(1), features)
    assert set(params) == {"params"}
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )
    keep = jax.jit(lambda params: connector.apply(params, features, mutable=["attention"])[1])
    layers = jax.tree.leaves(keep(params))
    assert [layer.shape for layer in layers] == [(2, SMALL[name]["tokens"], 9)] * (
        2 if name == "q_former" else 1
    )
    for layer in layers:
        sums = np.asarray(layer.sum(-1))
        assert (sums <= 1 + 1e-5).all()
        assert (sums > 1 - 1e-5).all() == (
            name == "q_former"
        )  # others attend to themselves or past the edge too
    if name != "perceiver":
        return
    own, patches = (
        params["params"]["block_0"],
        state @ params["params"]["input"]["kernel"] + params["params"]["input"]["bias"],
    )

    def normed(x, norm):
        x = np.asarray(x, np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * norm["scale"] + norm["bias"]

    latents = normed(params["params"]["latents"], own["latent_norm"])
    q = (latents @ own["q"]["kernel"]).reshape(3, 2, 4)
    keys = np.concatenate([normed(patches[1], own["patch_norm"]), latents])
    weights = np.exp(np.einsum("qhd,shd->hqs", q, (keys @ own["k"]["kernel"]).reshape(-1, 2, 4)) / 2)
    weights = (weights / weights.sum(-1, keepdims=True)).mean(0)[:, :9]
    np.testing.assert_allclose(layers[0][1], weights, rtol=1e-4)
