"""Model FLOPs: the count from the configuration against the traced step, and the trace against XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax.config import stage_config
from mllm_jax.connectors import CONNECTORS, VisionSpec, create
from mllm_jax.flops import count_flops
from mllm_jax.mini.connectors import mini_options
from mllm_jax.models import layers, mllm
from mllm_jax.models.convnext import ConvNextConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.lora import LoRA
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig
from mllm_jax.training import adapters
from mllm_jax.training.flops import batch_counts, mean_attention_pairs, step_flops
from mllm_jax.training.step import loss_and_grads

LLM = DecoderConfig(512, 256, 2, heads=2, kv_heads=1, head_width=128, mlp_width=768)
VISION = VisionConfig(width=256, depth=3, heads=2, mlp_width=1024, patch=14, image_size=112)
WHOLE = ("connector/.*", "llm/.*")
ALL = ("connector/.*", "llm/.*", "vision/.*")
ALONE = ("connector/.*",)
# model changes, what is trained, LoRA rank
CASES = {
    "stage 1": ({}, ALONE, 0),
    "stage 2": ({}, WHOLE, 0),
    "the encoder too": ({}, ALL, 0),
    "LoRA": ({}, ALONE, 16),
    "remat": ({"remat": "full", "vision_remat": "full"}, ALL, 0),
    "remat of stage 1": ({"remat": "full"}, ALONE, 0),
    "remat of products": ({"remat": "dots"}, WHOLE, 0),
    "dense connector": ({"connector": "dci"}, WHOLE, 0),
    # frozen: XLA's CPU compiler makes the weight gradient of a depthwise convolution from a dense one
    "convolutions": (
        {"connector": "c_abstractor", "connector_options": (("hidden", 1024), ("tokens", 16))},
        ("llm/.*",),
        0,
    ),
    "attention pooling": (
        {
            "connector": "resampler",
            "connector_options": (("depth", 2), ("hidden", 256), ("mlp", 1024), ("tokens", 16)),
        },
        ALONE,
        0,
    ),
    "Phi": (
        {"llm": dataclasses.replace(LLM, parallel=True, gated=False, norm="layer", tied=True, kv_heads=2)},
        WHOLE,
        0,
    ),
    "head alone": ({}, ("llm/head",), 0),
    "two encoders": (
        {"vision": EncodersConfig((VISION, dataclasses.replace(VISION, gated=True, registers=4)))},
        ALL,
        0,
    ),
    "mined maps of a ConvNeXt": (
        {
            "vision": EncodersConfig(
                (VISION, ConvNextConfig((96, 192, 384, 768), (1, 1, 2, 1), 256)), (112, 256), "mining"
            ),
            "image_size": 256,
        },
        WHOLE,
        0,
    ),
    "native aspect": (
        {
            "vision": dataclasses.replace(VISION, interpolation="bilinear_antialias", class_token=False),
            "max_patches": 64,
        },
        ALL,
        0,
    ),
}
ROWS, LENGTH, LABELS = 4, 256, 256


def made(name):
    changes, trainable, rank = CASES[name]
    model = ModelConfig(
        vision=VISION, llm=LLM, image_size=112, connector="mlp2x_gelu", remat="none", vision_remat="none"
    )
    model = dataclasses.replace(model, **changes)
    stage = stage_config()
    stage.trainable = trainable
    stage.lora.rank, stage.lora.dropout = rank, 0.0
    trained, frozen = adapters.abstract_split(mllm.abstract_params(model), stage)
    if rank:
        model = dataclasses.replace(model, lora=LoRA(rank=rank, dropout=0.0))
    batch = mllm.batch_spec(model, ROWS, length=LENGTH, labels=True)
    return model, trained, frozen, batch


def gradient(model):
    def step(trained, frozen, batch):
        return loss_and_grads(model, trained, frozen, batch, LABELS, 1, jax.random.key(0))[:2]

    return step


@pytest.mark.parametrize("name", [name for name in CASES if "remat" not in name])
def test_the_formula_is_the_traced_step(name):
    """All positions filled; the trace computes all pairs of attention."""
    model, trained, frozen, batch = made(name)
    flops = step_flops(model, trained, frozen)
    counts = batch_counts(model, ROWS, LENGTH, LABELS, 1) | {"attention_pairs": ROWS * LENGTH**2}
    assert count_flops(gradient(model), trained, frozen, batch) == pytest.approx(flops(counts), rel=1e-3)


@pytest.fixture
def unrolled(monkeypatch):
    """Scans as straight lines, whose iterations XLA counts each, and remat that its optimizer cannot undo."""

    def change(module, name, **changed):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: function(*args, **{**kwargs, **changed}))

    change(jax.lax, "scan", unroll=True)
    change(layers.nn, "remat", prevent_cse=True)
    change(jax, "checkpoint", prevent_cse=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_traced_step_is_what_the_compiler_counts(name, unrolled):
    model, trained, frozen, batch = made(name)
    compiled = jax.jit(gradient(model)).lower(trained, frozen, batch).compile()
    traced = count_flops(gradient(model), trained, frozen, batch)
    assert compiled.cost_analysis()["flops"] == pytest.approx(traced, rel=0.02)


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_connector_has_a_count(name):
    vision = VisionSpec(width=64, depth=6, select_layer=5, grid=(12, 12))
    connector = create(name, vision, 128, mini_options(name, tokens=36))
    forward, both = connector.flops((12, 12)), connector.flops((12, 12), params=True, features=True)
    assert forward > 0
    assert 2.9 * forward < both < 3.1 * forward  # each product has two gradients, each of its cost
    assert forward < connector.flops((12, 12), params=True) <= both


def test_attention_pairs_of_a_packed_row_with_windows(tiny_model):
    """The step's own count, from positions, against the mask."""
    from mllm_jax.models.attention import AttentionMask
    from mllm_jax.training.step import _attention_pairs

    model = dataclasses.replace(tiny_model, llm=dataclasses.replace(tiny_model.llm, windows=(0, 3)))
    batch = tiny.make_batch(model, [tiny.Row(1, 6, 3), tiny.Row(0, 20, 5)], 32)
    segments, positions = batch.segment_ids.copy(), batch.positions.copy()
    segments[0, 10:17], positions[0, 10:17] = 2, np.arange(7)
    batch = batch.replace(segment_ids=segments, positions=positions)
    segments = jnp.asarray(batch.segment_ids)
    masks = [AttentionMask(segments, segments, window=window) for window in (None, 3)]
    expected = np.mean([mask.dense().sum() for mask in masks])
    assert _attention_pairs(model, batch) == expected
    assert expected == sum(mean_attention_pairs((0, 3), length) for length in (10, 7, 20))


def test_what_cannot_be_counted_is_refused():
    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match=r"lax\.scan"):
        count_flops(loop, jnp.zeros((2, 2)))
