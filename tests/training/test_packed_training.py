"""Packed rows compute what unpacked ones do: logits, loss and gradients, for each weighting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.measure import sizes
from mllm_jax.data.packing import pack
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.rows import LOSS_WEIGHTINGS, ImageReader, RowEncoder, stack_rows
from mllm_jax.data.samples import Sample
from mllm_jax.models import attention, mllm, paths
from mllm_jax.training.step import loss_and_grads

LENGTH, SLOTS, PER_ROW = 192, 6, 6


def samples():
    """Text-only samples, samples of one and of two images, answers of several lengths."""
    found = []
    for i in range(14):
        images = tuple(tiny.png(10 * i + k) for k in range((0, 1, 2)[i % 3]))
        turns = (
            {"from": "human", "value": "<image>" * len(images) + "what" * (1 + i % 3)},
            {"from": "gpt", "value": "so " * (1 + i % 5)},
        )
        found.append(Sample(f"s{i}", images, turns))
    return found


def encoder(tokenizer, weighting="token", samples_per_row=PER_ROW):
    rule = WholeImage(Slot(4, size=(tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)))
    reader = ImageReader(ImageProcessor.clip(tiny.IMAGE_SIZE, aspect="pad"))
    return RowEncoder(
        reader, rule, tokenizer, "mistral_instruct", seq_len=LENGTH, image_slots=SLOTS,
        samples_per_row=samples_per_row, loss_weighting=weighting,
    )  # fmt: skip


def batches(tokenizer, weighting, tmp_path):
    """(packed, unpacked, rows of the packing)."""
    data, encode = samples(), encoder(tokenizer, weighting)
    rows = pack(sizes(data, encode, tmp_path, threads=2), encode.limits, np.random.default_rng(0))
    assert len(rows) < len(data) / 2
    packed = stack_rows([encode([data[i] for i in row]) for row in rows])
    unpacked = stack_rows([encode([one]) for one in data])
    return packed, unpacked, rows


@pytest.fixture
def model_by(tiny_model, monkeypatch):
    """`tiny_model` with a backend of attention, as a function of its name."""
    monkeypatch.setitem(attention.BACKENDS, "splash", tiny.interpreted_splash())
    return lambda backend: dataclasses.replace(tiny_model, attention=backend)


@pytest.mark.parametrize(
    ("backend", "windows"),
    [
        ("xla", ()),
        pytest.param("xla", (6,), marks=pytest.mark.slow),
        ("xla", (6, 0)),
        pytest.param("blockwise", (6, 0), marks=pytest.mark.slow),
        ("splash", (6, 0)),
    ],
    ids=str,
)
def test_logits_are_those_of_samples_alone(backend, windows, model_by, tiny_params, tiny_tokenizer, tmp_path):
    model = model_by(backend)
    model = dataclasses.replace(model, llm=dataclasses.replace(model.llm, windows=windows))
    packed, unpacked, rows = batches(tiny_tokenizer, "token", tmp_path)
    params = jax.tree.map(jnp.asarray, tiny_params)
    logits = jax.jit(lambda batch: mllm.apply(model, params, batch))
    together, alone = np.asarray(logits(packed.arrays)), np.asarray(logits(unpacked.arrays))
    for row, members in enumerate(rows):
        for segment, sample in enumerate(members, 1):
            here = packed.arrays.segment_ids[row] == segment
            there = unpacked.arrays.segment_ids[sample] == 1
            np.testing.assert_allclose(together[row, here], alone[sample, there], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "weighting"),
    [
        *(("xla", weighting) for weighting in LOSS_WEIGHTINGS),
        *(pytest.param(kernel, "token", marks=pytest.mark.slow) for kernel in ("splash", "blockwise")),
    ],
)
def test_loss_and_gradients_are_the_unpacked_weighted_mean(
    backend, weighting, model_by, tiny_params, tiny_tokenizer, tmp_path
):
    model = model_by(backend)
    packed, unpacked, _ = batches(tiny_tokenizer, weighting, tmp_path)
    params = jax.tree.map(jnp.asarray, tiny_params)

    @jax.jit
    def run(batch):
        return loss_and_grads(model, params, {}, batch, LENGTH, 1, jax.random.key(0))

    loss, grads, total = run(packed.arrays)
    expected, expected_grads, expected_total = run(unpacked.arrays)
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-5)
    for path, leaf in paths.flatten(grads).items():
        np.testing.assert_allclose(leaf, paths.flatten(expected_grads)[path], rtol=0, atol=1e-5, err_msg=path)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 1e-2


def test_weightings_give_a_sample_the_weight_they_say(tiny_tokenizer):
    data = samples()[:6]
    for name, total in (("token", lambda n: n), ("sample", lambda n: 1), ("sqrt", lambda n: n**0.5)):
        for one in data:
            weights = encoder(tiny_tokenizer, name)([one]).arrays.loss_weights
            np.testing.assert_allclose(weights.sum(), total(np.count_nonzero(weights)), rtol=1e-6)


def test_sizes_are_measured_once(tiny_tokenizer, tmp_path, monkeypatch):
    data, encode = samples(), encoder(tiny_tokenizer)
    found = sizes(data, encode, tmp_path, threads=2)
    assert found[:3].tolist() == [
        [len(encode.encode(one)), len(one.images), int((encode.encode(one).loss_weights > 0).sum()), 1]
        for one in data[:3]
    ]
    monkeypatch.setattr(RowEncoder, "needs", lambda *_: pytest.fail("measured again"))
    np.testing.assert_array_equal(sizes(data, encode, tmp_path, threads=2), found)
