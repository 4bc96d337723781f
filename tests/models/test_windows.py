"""Sliding windows count real columns: padding in a cache and neighbours in a packed row do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.models.attention import AttentionMask
from mllm_jax.models.decoder import Decoder, DecoderConfig, init_cache

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


@pytest.fixture(scope="module", params=[(3,), (3, 0)], ids=["uniform", "alternating"])
def model(request):
    config = DecoderConfig(**SIZE, windows=request.param)

    def init(decoder):
        return decoder.logits(
            decoder(decoder.embed(jnp.zeros((1, 1), int)), *[jnp.zeros((1, 1), int)] * 2)[0]
        )

    params = jax.jit(lambda key: Decoder(config).init(key, method=init))(jax.random.key(0))["params"]
    return config, jax.tree.map(lambda x: 5 * x, params)


def test_mask_by_hand():
    columns = jnp.arange(6)
    segments = jnp.array([[1, 1, 0, 1, 2, 2]])
    mask = np.asarray(AttentionMask(segments, segments, columns, columns, window=2).dense())[0].astype(int)
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


def test_windows_matter_and_short_rows_are_not_touched(model):
    config, params = model
    full = DecoderConfig(**SIZE)
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
