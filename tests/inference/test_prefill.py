"""Reading prompts in pieces: the same answers for every limit, within the limit."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import (  # noqa: F401
    STOP,
    config,
    expected,
    load,
    make_requests,
    params,
    prompt,
    run,
)

from mllm_jax.data.batch import Batch
from mllm_jax.inference.batching import Request
from mllm_jax.inference.likelihood import answer_log_likelihoods
from mllm_jax.inference.prefill import images_at_once, piece_length, prefill_limit, read
from mllm_jax.models import mllm

SCRIPT = pathlib.Path(__file__).parent / "prefill_memory.py"


@pytest.mark.parametrize(
    "limit", [20_000, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 60_000))]
)
def test_answers_do_not_depend_on_the_limit(config, params, expected, limit):  # noqa: F811
    assert piece_length(config, 4, 16, 37, limit) < 16 <= piece_length(config, 4, 16, 37, prefill_limit())
    answers = run(config, params, make_requests(), buckets=(16,), prefill_bytes=limit)
    assert {a.id: (a.tokens, a.stopped) for a in answers} == expected


def test_likelihoods_do_not_depend_on_the_limit(config, params):  # noqa: F811
    rng = np.random.default_rng(2)
    words = rng.integers(4, 30, (7, 14)).tolist()
    requests = [
        Request(str(i), prompt([1], i % 3, ids[:5], ids[5:]), (i,) * (i % 3)) for i, ids in enumerate(words)
    ]

    def found(limit):
        settings = {"load_image": load, "batch_size": 4, "buckets": (16,), "prefill_bytes": limit}
        return list(answer_log_likelihoods(config, params, requests, **settings))

    assert found(1) == pytest.approx(found(prefill_limit()), rel=1e-5)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def read_all(config, params, rows, start, limit):  # noqa: F811
    """All hidden states of rows behind `start` columns that are read first, and the cache."""
    batch, length = rows.tokens.shape
    cache = mllm.empty_cache(config, batch, length + 3)
    at = jnp.broadcast_to(jnp.arange(length), (batch, length))
    first = jax.tree.map(lambda field: field[:, :start], rows)
    rest = jax.tree.map(lambda field: field[:, start:], rows)
    before, cache = read(config, params, first, None, cache, at[:, :start], 1 << 40)
    after, cache = read(config, params, rest, None, cache, at[:, : length - start], limit)
    return jnp.concatenate([before, after], axis=1), cache


@pytest.mark.parametrize("windows", [(), pytest.param((3,), marks=pytest.mark.slow), (0, 3)], ids=str)
def test_pieces_are_read_into_the_same_columns(config, params, windows):  # noqa: F811
    """Behind a prefix, with padding, and with windows that count columns back."""
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, windows=windows))
    rng = np.random.default_rng(0)
    rows = Batch.spec(3, length=13, labels=False).empty()
    for row, length in enumerate((13, 9, 2)):
        rows.tokens[row, :length] = rng.integers(1, 30, length)
        rows.positions[row, :length] = np.arange(length)
        rows.segment_ids[row, :length] = 1
    whole, cache = read_all(config, params, rows, 2, 1 << 40)
    for limit in (1, 40_000):
        pieces, same = read_all(config, params, rows, 2, limit)
        for row, length in enumerate((13, 9, 2)):
            np.testing.assert_allclose(pieces[row, :length], whole[row, :length], rtol=2e-5, atol=2e-5)
        np.testing.assert_array_equal(same.segments, cache.segments)
        np.testing.assert_allclose(same.k[:, 0], cache.k[:, 0], rtol=2e-5, atol=2e-5)
        assert int(same.column) == int(cache.column) == 13


def test_pieces_fit_the_limit(config):  # noqa: F811
    lengths = [piece_length(config, 8, 500, 600, limit) for limit in (1, 1 << 20, 1 << 22, 1 << 40)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 1
    assert lengths[-1] == 500
    assert images_at_once(config, 1) == 1
    assert images_at_once(config, 1 << 30) > images_at_once(config, 1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["generate", "likelihood"])
def test_64_prompts_of_2048_tokens_stay_under_2_gb(run_script, what):
    done = run_script(SCRIPT, what, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(set(map(str, found["answers"]))) > 10
    assert found["peak_bytes"] < 2e9
