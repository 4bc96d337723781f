"""The loss with gathered, chunked logits against the plain formula on all logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax.models import mllm, paths
from mllm_jax.training import loss as loss_module
from mllm_jax.training.loss import weighted_loss

LENGTH = 24
ROWS = [
    tiny.Row(images=1, text=15, labels=9),
    tiny.Row(images=0, text=7, labels=3),  # text only
    tiny.Row(images=2, text=16, labels=1),  # full
    tiny.Row(images=1, text=5, labels=0),  # nothing supervised
    tiny.Row(images=0, text=0, labels=0),  # an empty row
]
MOST_LABELS = 9


@pytest.fixture(scope="module")
def params(tiny_params):
    return jax.tree.map(jnp.asarray, tiny_params)


@pytest.fixture(scope="module")
def batch(tiny_model):
    """Rows of all kinds, with weights other than 0 and 1, and one on the first token, which nothing predicts."""
    made = tiny.make_batch(tiny_model, ROWS, LENGTH)
    weights = np.random.default_rng(1).uniform(0.1, 3.0, made.loss_weights.shape).astype(np.float32)
    weights *= made.loss_weights
    weights[1, 0] = 100.0
    return jax.tree.map(jnp.asarray, made.replace(loss_weights=weights))


def dense_losses(model, params, batch):
    """Loss of every position and its weight, [B, T - 1], from all logits."""
    logits = mllm.apply(model, params, batch)[:, :-1].astype(jnp.float32)
    targets, weights = batch.tokens[:, 1:], batch.loss_weights[:, 1:]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0], weights


@pytest.fixture(scope="module")
def dense(tiny_model, params, batch):
    """(loss sum, weight sum, gradient) by the plain formula."""

    def total(params):
        losses, weights = dense_losses(tiny_model, params, batch)
        return (losses * weights).sum()

    value, grads = jax.jit(jax.value_and_grad(total))(params)
    return value, batch.loss_weights[:, 1:].sum(), grads


# 4-token chunks leave a remainder; the last two limits are the row length and more than it.
@pytest.mark.parametrize(
    ("chunk", "label_tokens"), [(4, MOST_LABELS), (4, LENGTH), (128, MOST_LABELS), (16, LENGTH + 9)]
)
def test_gathered_and_chunked_equals_dense(
    tiny_model, params, batch, dense, monkeypatch, chunk, label_tokens
):
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    total, weights = jax.jit(lambda p: weighted_loss(tiny_model, p, batch, label_tokens))(params)
    assert (total.dtype, weights.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(total, dense[0], rtol=1e-5)
    np.testing.assert_allclose(weights, dense[1], rtol=1e-6)


def test_gradients_equal_dense(tiny_model, params, batch, dense, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    grads = jax.jit(jax.grad(lambda p: weighted_loss(tiny_model, p, batch, MOST_LABELS)[0]))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, dense[2])
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 0.1  # there is something to compare


@pytest.mark.parametrize(
    "trained",
    ["all", pytest.param("head", marks=pytest.mark.slow), pytest.param("body", marks=pytest.mark.slow)],
)
def test_gradients_of_a_tied_head_with_bias_and_cap(tiny_model, batch, monkeypatch, trained):
    """As Phi-2 and Gemma 2 have them; also where only the head, or only what is before it, is trained."""
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    llm = dataclasses.replace(tiny_model.llm, tied=True, head_bias=True, logit_softcap=5.0)
    model = dataclasses.replace(tiny_model, llm=llm)
    params = jax.tree.map(jnp.asarray, tiny.random_params(mllm.abstract_params(model)))
    of_head = ("llm/embedding", "llm/head_bias")
    patterns = {"all": (".*",), "head": of_head, "body": (r"(?!llm/(embedding|head_bias)).*",)}[trained]
    learned, frozen = paths.split(params, patterns)

    def dense(learned):
        losses, weights = dense_losses(model, paths.merge(learned, frozen), batch)
        return (losses * weights).sum()

    def chunked(learned):
        return weighted_loss(model, paths.merge(learned, frozen), batch, MOST_LABELS)[0]

    found, expected = (jax.jit(jax.grad(each))(learned) for each in (chunked, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(found)) > 0.1


def test_logits_exist_only_for_supervised_positions_in_chunks(tiny_model, params, batch, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    jaxpr = jax.make_jaxpr(lambda p: weighted_loss(tiny_model, p, batch, MOST_LABELS))(params)
    width, vocab = tiny_model.llm.width, tiny_model.llm.vocab
    shapes = {v.aval.shape for v in every_output(jaxpr.jaxpr) if v.aval.shape[-1:] == (vocab,)}
    shapes = {shape for shape in shapes if shape[-2:] != (width, vocab)}  # the head itself
    assert shapes
    rows = len(ROWS)
    # 9 labels in chunks of at most 4: three times 3.
    assert max(np.prod(shape[:-1]) for shape in shapes) == rows * 3, shapes


def every_output(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from every_output(inner)


def test_nothing_supervised_is_zero_and_not_nan(tiny_model, params, batch):
    silent = batch.replace(loss_weights=jnp.zeros_like(batch.loss_weights))
    total, weights = jax.jit(lambda p: weighted_loss(tiny_model, p, silent, MOST_LABELS))(params)
    assert (float(total), float(weights)) == (0.0, 0.0)


def test_bfloat16_computes_logits_and_sums_in_float32(tiny_model, params, batch, dense):
    model = dataclasses.replace(tiny_model, dtype="bfloat16")

    @jax.jit
    def both(params):
        hidden, _ = mllm.apply(model, params, batch, method="hidden_states")
        return weighted_loss(model, params, batch, MOST_LABELS)[0], hidden

    total, hidden = both(params)
    assert hidden.dtype == jnp.bfloat16
    # The rest in float64, from the same bfloat16 hidden states and the head as the model rounds it.
    head = np.asarray(jnp.asarray(params["llm"]["head"], jnp.bfloat16), np.float64)
    logits = np.asarray(hidden[:, :-1], np.float64) @ head
    top = logits.max(axis=-1)
    normalizer = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    label = np.take_along_axis(logits, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    expected = ((normalizer - label) * batch.loss_weights[:, 1:]).sum()
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(total, dense[0], rtol=3e-2)
    assert float(total) != float(dense[0])
