"""Sliding windows count real columns: padding in a cache and neighbours in a packed row do not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.models.attention import AttentionMask
from mllm_jax.models.decoder import Cache, Decoder, DecoderConfig, init_cache

SIZE = {"vocab": 19, "width": 12, "depth": 3, "heads": 2, "kv_heads": 1, "head_width": 6, "mlp_width": 10}
TOKENS = np.random.RandomState(0).randint(0, 19, (1, 9))


def run(config, params, tokens, positions, segments, cache=None):
    """Final hidden states and the cache."""

    def forward(decoder, tokens, positions, segments, cache):
        return decoder(decoder.embed(tokens), positions, segments, cache)

    arguments = [jnp.asarray(value, jnp.int32) for value in (tokens, positions, segments)]
    return jax.jit(lambda p, *a: Decoder(config).apply({"params": p}, *a, method=forward))(
        params, *arguments, cache
    )


CASES = {"uniform": ((3,), 3), "uneven": ((3, 0), 3), "alternating": ((0, 3), 4)}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def model(request):
    windows, depth = request.param
    config = DecoderConfig(**(SIZE | {"depth": depth}), windows=windows)

    def init(decoder):
        return decoder.logits(
            decoder(decoder.embed(jnp.zeros((1, 1), int)), *[jnp.zeros((1, 1), int)] * 2)[0]
        )

    params = jax.jit(lambda key: Decoder(config).init(key, method=init))(jax.random.key(0))["params"]

    # Matrices that make attention sharp. Norms stay as they are, so that what comes out is of order one: float32 rounds
    # rows of other lengths differently, by 1e-6 of the values. (In float64 both sides of each test are equal.)
    def scaled(path, x):
        return x if path[-1].key == "scale" else 5 * x

    return config, jax.tree_util.tree_map_with_path(scaled, params)


def test_mask_by_hand():
    columns = jnp.arange(6)
    segments = jnp.array([[1, 1, 0, 1, 2, 2]])
    mask = np.asarray(AttentionMask(segments, segments, columns, window=2).dense())[0].astype(int)
    np.testing.assert_array_equal(
        mask,
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [0, 1, 0, 1, 0, 0],  # the padding column is not counted
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1, 1],
        ],
    )


def test_mask_of_random_rows():
    """Packed rows with padding anywhere, queries that are the last columns of a cache: key by key as the rule says."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 4, (5, 12)), axis=1) * rng.integers(0, 2, (5, 12))
    columns = np.arange(7, 12)
    queries = segments[:, columns]
    for window in (1, 2, 3, 5, 12, None):
        mask = AttentionMask(jnp.array(queries), jnp.array(segments), jnp.array(columns), window=window)
        found = np.asarray(mask.dense())
        for row, query in np.ndindex(queries.shape):
            mine = (segments[row] == queries[row, query]) & (segments[row] != 0)
            keys = np.flatnonzero(mine[: columns[query] + 1]).tolist()
            assert np.flatnonzero(found[row, query]).tolist() == (keys[-window:] if window else keys)


@pytest.mark.parametrize("windows", [(), (3, 0)])
def test_the_cache_is_written_in_place(windows):
    """A decode step with a donated cache needs a fraction of it besides."""
    config = DecoderConfig(64, 64, 16, heads=4, kv_heads=4, head_width=16, mlp_width=64, windows=windows)
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(
        lambda key: Decoder(config).init(key, jnp.zeros((1, 1, 64)), one, one), jax.random.key(0)
    )
    cache = jax.eval_shape(lambda: jax.tree.leaves(init_cache(config, 8, 512, jnp.float32)))
    rows = jax.ShapeDtypeStruct((8, 1), jnp.int32)

    def step(params, tokens, positions, segments, cache):
        embeddings = Decoder(config).apply(params, tokens, method="embed")
        hidden, cache = Decoder(config).apply(params, embeddings, positions, segments, Cache(*cache))
        return hidden, jax.tree.leaves(cache)

    compiled = jax.jit(step, donate_argnums=4).lower(params, rows, rows, rows, cache).compile()
    found = compiled.memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
    assert found.alias_size_in_bytes >= size
    assert found.temp_size_in_bytes <= 0.2 * size


def test_windows_matter_and_short_rows_are_not_touched(model):
    config, params = model
    full = dataclasses.replace(config, windows=())
    arguments = (TOKENS, np.arange(9)[None], np.ones((1, 9)))
    windowed, plain = run(config, params, *arguments)[0], run(full, params, *arguments)[0]
    np.testing.assert_allclose(windowed[:, :3], plain[:, :3], atol=1e-6)
    assert float(jnp.abs(windowed[:, 3:] - plain[:, 3:]).max()) > 1e-3


def test_padding_in_the_cache_is_not_counted(model):
    config, params = model
    whole, _ = run(config, params, TOKENS, np.arange(9)[None], np.ones((1, 9)))
    # 4 tokens and 3 padding columns, then 5 tokens behind them
    first = np.pad(TOKENS[:, :4], ((0, 0), (0, 3)))
    segments = np.array([[1, 1, 1, 1, 0, 0, 0]])
    cache = init_cache(config, 1, 12, jnp.float32)
    a, cache = run(config, params, first, np.arange(7)[None] * segments, segments, cache)
    b, _ = run(config, params, TOKENS[:, 4:], np.arange(4, 9)[None], np.ones((1, 5)), cache)
    np.testing.assert_allclose(jnp.concatenate([a[:, :4], b], axis=1), whole, atol=1e-5)


def test_a_packed_row_equals_its_samples(model):
    config, params = model
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    packed, _ = run(config, params, TOKENS, positions, segments)
    for part in (slice(0, 4), slice(4, 9)):
        tokens = TOKENS[:, part]
        alone, _ = run(config, params, tokens, np.arange(tokens.shape[1])[None], np.ones_like(tokens))
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
