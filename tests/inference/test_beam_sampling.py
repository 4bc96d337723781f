"""Sampled beams against a plain loop without cache, and that the draws belong to the question."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import STOP, VOCAB, config, logits_without_cache, make_requests, run  # noqa: F401

from mllm_jax.inference import beam_sampling
from mllm_jax.inference.beam_sampling import BeamSampling
from mllm_jax.models import mllm
from mllm_jax.models.decoder import Cache

STEPS = 4
OTHER_STOP = 31


@pytest.fixture(scope="module")
def params(config):  # noqa: F811
    """Random weights; without the initialiser, which takes longer to compile than all of this to run."""
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(lambda: mllm.init(config, jax.random.key(1)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), shapes)


def log_softmax(values):
    values = np.asarray(values, np.float64)
    return values - np.log(np.sum(np.exp(values - values.max()))) - values.max()


def grow(beams, ended, logits, noise, step, sampling, stops):
    """One step by the rules of transformers' beam sampling, with lists instead of arrays.

    Returns the beams, the best answers that have ended, and whether the question is done.
    """
    width = sampling.beams
    total = np.stack(
        [(log_softmax(row) + s) / sampling.temperature for row, (_, s) in zip(logits, beams, strict=True)]
    )
    if sampling.top_k:
        for row in total:
            row[np.argsort(-row)[max(sampling.top_k, 1 + len(stops)) :]] = -np.inf
    vocab, total = total.shape[1], total.reshape(-1)
    drawn = np.argsort(-(total + noise), kind="stable")[: width * max(2, 1 + len(stops))]
    drawn = sorted(drawn, key=lambda place: -total[place])
    best, after = total[drawn[0]] / (step + 1), []
    for rank, place in enumerate(drawn):
        tokens, token = beams[place // vocab][0], int(place % vocab)
        if token not in stops:
            after.append(((*tokens, token), total[place]))
        elif rank < width:
            ended = sorted([*ended, (total[place] / (step + 1), tokens)], key=lambda e: -e[0])[:width]
    return after[:width], ended, len(ended) == width and ended[-1][0] >= best


@functools.partial(jax.jit, static_argnums=2)
def gumbel(key, step, count):
    key = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, step), (count,))


def noise_of(sampling, name, step, vocab):
    return np.asarray(gumbel(sampling.key(name), step, sampling.beams * vocab))


def reference(config, params, request, sampling, stops):  # noqa: F811
    """The answer to one question, every token from logits without cache."""
    beams = [((), 0.0)] * sampling.beams
    ended = []
    for step in range(STEPS):
        logits = [logits_without_cache(config, params, request, tokens)[-1] for tokens, _ in beams]
        noise = noise_of(sampling, request.id, step, VOCAB)
        beams, ended, done = grow(beams, ended, logits, noise, step, sampling, stops)
        if done:
            break
    else:
        ended += [(score / STEPS, tokens, False) for tokens, score in beams]
    _, tokens, *unfinished = max(ended, key=lambda e: e[0])
    return tokens, not unfinished


# One setting for all tests of the whole loop: what is compiled for one serves the others.
SAMPLING, STOPS = BeamSampling(1, 2, 2.0, top_k=6), (STOP, OTHER_STOP)


def answers(config, params, requests, sampling=SAMPLING, **settings):  # noqa: F811
    settings = {"batch_size": 4, "stop_ids": list(STOPS), "max_new_tokens": STEPS} | settings
    return run(config, params, requests, sampling=sampling, **settings)


@pytest.fixture(scope="module")
def found(config, params):  # noqa: F811
    """Answers to nine questions, and how many each batch held."""
    batches = []
    return answers(config, params, make_requests(9), on_batch=batches.append), batches


def test_beams_are_those_of_the_plain_loop(config, params, found):  # noqa: F811
    assert {a.id: (a.tokens, a.stopped) for a in found[0]} == {
        r.id: reference(config, params, r, SAMPLING, STOPS) for r in make_requests(9)
    }
    assert len({a.stopped for a in found[0]}) == 2  # both kinds of answers were met


def test_beams_share_the_rows_of_a_batch(found):
    assert found[1] == [2, 2, 2, 2, 1]  # four rows, two beams each


def test_draws_belong_to_seed_and_question(config, params, found):  # noqa: F811
    requests = make_requests(9)
    first = {a.id: a.tokens for a in found[0]}
    moved = answers(config, params, requests[:1:-1], buckets=(64,))  # other neighbours, other padding
    assert {a.id: a.tokens for a in moved} == dict(list(first.items())[2:])
    others = answers(config, params, requests, dataclasses.replace(SAMPLING, seed=2))
    assert {a.id: a.tokens for a in others} != first


@pytest.mark.parametrize(("top_k", "stops"), [(0, (3,)), (3, ()), (1, (3, 5, 6))], ids=str)
def test_one_step(top_k, stops):
    """Few stop ids and few tokens to choose from: what is drawn, kept and ended."""
    sampling, vocab, batch = BeamSampling(5, 2, 0.7, top_k), 9, 40
    rng = np.random.default_rng(top_k)
    logits = rng.normal(size=(batch, 2, vocab)).astype(np.float32)
    scores = rng.normal(size=(batch, 2)).astype(np.float32) - 2
    tokens = np.zeros((batch, 2, 3), np.int32)
    tokens[:, :, 0] = [7, 8]
    none = np.zeros((batch, 2), np.int32)
    cache = Cache(
        *(jnp.zeros((1, 2 * batch, 1, 1, 1)) for _ in "kv"),
        jnp.zeros((2 * batch, 1), jnp.int32),
        jnp.int32(0),
    )
    state = beam_sampling._Beams(
        jnp.int32(1), jnp.asarray(tokens), jnp.asarray(scores), jnp.zeros_like(tokens),
        jnp.full((batch, 2), beam_sampling._NEVER), jnp.asarray(none), jnp.zeros(batch, bool),
        jnp.zeros((2 * batch, 1)), cache,
    )  # fmt: skip
    names = [f"q{index}" for index in range(batch)]
    keys = np.stack([sampling.key(name) for name in names])
    grown, _ = jax.jit(beam_sampling._grow, static_argnums=2)(
        state, jnp.asarray(logits.reshape(-1, vocab)), sampling, jnp.asarray(stops, jnp.int32), keys
    )
    names_read = ("tokens", "scores", "ended", "ended_scores", "done")
    grown = types.SimpleNamespace(**{name: np.asarray(getattr(grown, name)) for name in names_read})
    ends = 0
    for row, name in enumerate(names):
        beams = [((7,), scores[row, 0]), ((8,), scores[row, 1])]
        noise = noise_of(sampling, name, 1, vocab)
        beams, ended, done = grow(beams, [], logits[row], noise, 1, sampling, stops)
        assert grown.tokens[row, :, :2].tolist() == [list(tokens) for tokens, _ in beams]
        assert grown.scores[row] == pytest.approx([score for _, score in beams], rel=1e-5)
        count = len(ended)
        assert grown.ended_scores[row, :count] == pytest.approx([score for score, _ in ended], rel=1e-5)
        assert (grown.ended_scores[row, count:] == beam_sampling._NEVER).all()
        assert grown.ended[row, :count, 0].tolist() == [tokens[0] for _, tokens in ended]
        assert grown.done[row] == done
        ends += count
    assert (ends > 0) == bool(stops)


def test_impossible_sampling():
    for values in ({"beams": 0}, {"temperature": 0.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match="at least one beam"):
            BeamSampling(**values)
