"""Drawn tokens: from the right distribution, cut as nucleus sampling cuts, and the same wherever a row stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import config, expected, make_requests, params, run  # noqa: F401

from mllm_jax.inference.sampling import Sampling, choose, make_draws

VOCAB = 7


def drawn(logits, sampling, count):
    """`count` tokens drawn from the same logits, for requests "0", "1", ..."""
    rows = np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits)))
    draws = make_draws([sampling] * count, [str(i) for i in range(count)], count)
    return np.asarray(jax.jit(choose)(jnp.asarray(rows), draws, jnp.zeros(count, jnp.int32)))


def nucleus(logits, temperature, top_p):
    """Probabilities of nucleus sampling, token by token from the most probable one."""
    probabilities = np.exp(np.asarray(logits, np.float64) / temperature)
    probabilities /= probabilities.sum()
    kept, total = np.zeros(len(probabilities)), 0.0
    for token in np.argsort(-probabilities):
        if total < top_p:
            kept[token] = probabilities[token]
            total += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.4), (1.3, 1e-6)], ids=str
)
def test_tokens_come_as_often_as_nucleus_sampling_draws_them(temperature, top_p):
    logits = [1.0, 0.2, -0.5, 2.0, 0.1, -3.0, 1.5]
    count = 6000
    found = np.bincount(drawn(logits, Sampling(temperature, top_p, seed=3), count), minlength=VOCAB) / count
    wanted = nucleus(logits, temperature, top_p)
    assert (found[wanted == 0] == 0).all()
    assert np.abs(found - wanted).max() < 4 * np.sqrt(0.25 / count)


def test_greedy_rows_beside_drawn_ones_and_empty_rows():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, VOCAB)), jnp.float32)
    samplings = [None, Sampling(5.0), Sampling(0.0), Sampling(5.0, 1e-9)]
    draws = make_draws(samplings, ["a", "b", "c", "d"], 5)
    tokens = np.asarray(choose(logits, draws, jnp.zeros(5, jnp.int32)))
    likeliest = np.asarray(logits.argmax(-1))
    assert (tokens[[0, 2, 3, 4]] == likeliest[[0, 2, 3, 4]]).all()
    assert make_draws([None, Sampling(0.0)], ["a", "b"], 2) is None


def test_draws_are_numbered_by_the_answers_length():
    logits = jnp.zeros((40, VOCAB))
    draws = make_draws([Sampling()] * 40, ["same"] * 40, 40)
    tokens = np.asarray(choose(logits, draws, jnp.arange(40, dtype=jnp.int32) // 2))
    assert (tokens[::2] == tokens[1::2]).all()
    assert len(set(tokens.tolist())) > 3


SAMPLING = Sampling(temperature=1.5, top_p=0.9, seed=11)


@pytest.mark.slow
def test_answers_do_not_depend_on_batching_and_change_with_the_seed(config, params, expected):  # noqa: F811
    requests = make_requests()
    first = {a.id: a.tokens for a in run(config, params, requests, sampling=SAMPLING)}
    moved = run(
        config, params, requests[::-1], sampling=SAMPLING, batch_size=7, buckets=(64,), prefill_bytes=1
    )
    assert {a.id: a.tokens for a in moved} == first
    assert [a.id for a in moved] == [r.id for r in requests[::-1]]
    other = {a.id: a.tokens for a in run(config, params, requests, sampling=Sampling(1.5, 0.9, seed=12))}
    assert other != first
    cold = run(config, params, requests, sampling=Sampling(0.0))
    assert {a.id: (a.tokens, a.stopped) for a in cold} == expected
    assert first != {name: tokens for name, (tokens, _) in expected.items()}


@pytest.mark.parametrize(
    "values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_settings(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Sampling(**values)
