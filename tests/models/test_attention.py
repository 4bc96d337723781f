"""Every backend that runs on a CPU computes what the oracle does, forward and backward; others say what they miss."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax.models import attention
from mllm_jax.models.attention import AttentionMask, Use, blockwise, cudnn, selfcheck, tokamax, xla

LENGTH = 300  # three of splash's blocks of 128 with padding, and no multiple of any block
# Segments that start and end inside blocks, one longer than two blocks, padding; rows that are one segment or empty.
SEGMENTS = np.zeros((3, LENGTH), np.int32)
SEGMENTS[0, :290] = np.repeat([1, 2, 3, 4], [5, 220, 1, 64])
SEGMENTS[1] = 1
SEGMENTS[2, :40] = 1
IDS = jnp.asarray(SEGMENTS)
RULES = {
    "causal": AttentionMask(IDS, IDS),
    "window": AttentionMask(IDS, IDS, window=100),
    "bidirectional": AttentionMask(IDS, IDS, causal=False),
    "tower": None,
}
BACKENDS = {
    "blockwise": functools.partial(blockwise.attend, block=64),
    "blockwise, one block": functools.partial(blockwise.attend, block=512),
    "splash": tiny.interpreted_splash().attend,
}


def draw(heads=4, kv_heads=2, width=8):
    """Queries, keys, values and a cotangent that is 0 at padding."""
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.standard_normal((3, LENGTH, count, width)), jnp.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    return q, k, v, cotangent * (SEGMENTS != 0)[..., None, None]


def both(attend, mask, q, k, v, cotangent, softcap=None):
    """Output, 0 at padding, and the gradients of queries, keys and values."""

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *a: attend(*a, mask, 0.4, softcap), q, k, v)
        return (out * (SEGMENTS != 0)[..., None, None], *pull(cotangent))

    return run(q, k, v)


@functools.cache
def expected(rule, softcap=None):
    return both(xla.attend, RULES[rule], *draw(), softcap=softcap)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_equal_the_oracle(backend, rule):
    if backend == "blockwise, one block" and rule != "causal":
        pytest.skip("once is enough")
    softcap = 2.0 if rule == "window" else None  # as in Gemma 2
    found = both(BACKENDS[backend], RULES[rule], *draw(), softcap=softcap)
    for name, a, b in zip(("out", "q", "k", "v"), found, expected(rule, softcap), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)
        assert float(jnp.abs(b).max()) > 0.1


def test_the_oracle_by_hand():
    """One query at a time in NumPy, with the rules as they are written down."""
    q, k, v, _ = draw()
    for mask in RULES.values():
        out = xla.attend(q, k, v, mask, 0.4, None)
        for row, at in ((0, 4), (0, 130), (0, 225), (0, 289), (1, 299), (2, 39)):
            keys = np.arange(LENGTH)
            if mask is not None:
                keys = keys[SEGMENTS[row] == SEGMENTS[row, at]]
                keys = keys[keys <= at] if mask.causal else keys
                keys = keys[-mask.window :] if mask.window else keys
            for head in range(4):
                scores = 0.4 * np.asarray(k)[row, keys, head // 2] @ np.asarray(q)[row, at, head]
                weights = np.exp(scores - scores.max())
                value = weights @ np.asarray(v)[row, keys, head // 2] / weights.sum()
                np.testing.assert_allclose(out[row, at, head], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule] is not None])
def test_key_ranges_are_the_dense_mask(rule):
    mask = RULES[rule]
    first, last = (np.asarray(x)[..., None] for x in mask.key_ranges())
    columns = np.arange(LENGTH)
    np.testing.assert_array_equal((first <= columns) & (columns <= last), mask.dense())


def test_blockwise_in_half_precision():
    arrays = [x.astype(jnp.bfloat16) for x in draw()]
    exact = both(xla.attend, RULES["causal"], *(x.astype(jnp.float32) for x in arrays))
    for a, b in zip(both(blockwise.attend, RULES["causal"], *arrays), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=0.02 * float(jnp.abs(b).max()))


def test_blockwise_stores_no_logits():
    shape = jax.ShapeDtypeStruct((2, 2048, 4, 16), jnp.float32)
    segments = jnp.ones((2, 2048), jnp.int32)
    mask = AttentionMask(segments, segments)

    def bytes_of(attend):
        step = jax.grad(lambda q, k, v: attend(q, k, v, mask, 0.25, None).sum(), (0, 1, 2))
        return jax.jit(step).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 2 * 4 * 2048**2
    assert bytes_of(xla.attend) >= logits
    assert bytes_of(blockwise.attend) <= logits / 8


LLM = Use(heads=32, kv_heads=8, head_width=128, dtype="bfloat16", length=2048)
TOWER = Use(16, 16, 64, "bfloat16", length=577, masked=False, causal=False)


@pytest.mark.parametrize(
    ("platform", "use", "backend"),
    [
        ("tpu", LLM, "splash"),
        ("gpu", LLM, "cudnn"),
        ("gpu", TOWER, "cudnn"),
        ("cpu", LLM, "blockwise"),
        ("cpu", TOWER, "blockwise"),
        ("cpu", Use(4, 4, 32, "float32", length=144, masked=False), "xla"),
        ("cpu", Use(4, 2, 32, "float32", length=200), "xla"),
        ("gpu", Use(32, 8, 128, "float32"), "xla"),
        ("gpu", Use(8, 4, 256, "bfloat16", softcap=50.0), "xla"),
    ],
)
def test_auto_takes_the_platforms_own_where_it_can(platform, use, backend):
    assert attention.choose("auto", use, platform)[0] == backend


@pytest.mark.parametrize(
    ("name", "platform", "use", "message"),
    [
        ("flash", "cpu", LLM, "valid: auto, xla, blockwise, splash, cudnn, tokamax"),
        ("splash", "cpu", LLM, "runs on tpu, and this is cpu"),
        ("cudnn", "tpu", LLM, "runs on gpu, and this is tpu"),
        ("cudnn", "gpu", Use(32, 8, 128, "float32"), "float32"),
        ("cudnn", "gpu", Use(8, 4, 256, "bfloat16", softcap=50.0), "soft cap"),
        ("cudnn", "gpu", Use(8, 4, 36, "bfloat16"), "36"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_by_name(name, platform, use, message):
    with pytest.raises(ValueError, match=f"attention backend '{name}'.*{message}"):
        attention.choose(name, use, platform)


def gpu(kind, version, capability):
    """A GPU as JAX shows it."""
    client = types.SimpleNamespace(platform_version=version)
    return types.SimpleNamespace(
        platform="gpu", device_kind=kind, client=client, compute_capability=capability
    )


WIDE = Use(8, 4, 256, "bfloat16", length=2048)


@pytest.mark.parametrize(
    ("device", "use", "backend", "reason"),
    [
        (("AMD Instinct MI300X", "PJRT C API\nrocm 60300", "gfx942"), LLM, "xla", "NVIDIA.*MI300X"),
        (("Tesla T4", "PJRT C API\ncuda 12080", "7.5"), LLM, "xla", "7.5"),
        (("NVIDIA A100", "PJRT C API\ncuda 12080", "8.0"), LLM, "cudnn", "auto on gpu"),
        (("NVIDIA A100", "PJRT C API\ncuda 12080", "8.0"), WIDE, "xla", "at most 128.*256"),
        (("NVIDIA L4", "PJRT C API\ncuda 12080", "8.9"), Use(8, 4, 136, "bfloat16"), "xla", "136"),
        (("NVIDIA H100", "PJRT C API\ncuda 12080", "9.0"), WIDE, "cudnn", "auto on gpu"),
        (("NVIDIA B200", "PJRT C API\ncuda 12080", "10.0"), WIDE, "cudnn", "auto on gpu"),
    ],
)
def test_auto_leaves_to_xla_what_cudnn_cannot_do_on_this_gpu(device, use, backend, reason, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [gpu(*device)])
    name, why = attention.choose("auto", use, "gpu")
    assert name == backend
    assert re.search(reason, why)
    if backend == "xla":
        with pytest.raises(ValueError, match=f"'cudnn' cannot compute.*{reason}"):
            attention.choose("cudnn", use, "gpu")


def test_queries_against_a_cache_are_for_xla_alone():
    q, k, v, _ = draw()
    cached = RULES["causal"].replace(q_columns=jnp.arange(LENGTH))
    for name in ("xla", "auto"):
        np.testing.assert_allclose(
            attention.attend(q, k, v, cached, name), attention.attend(q, k, v, RULES["causal"]), atol=1e-6
        )
    for mask, keys in ((cached, LENGTH), (None, 7)):
        with pytest.raises(ValueError, match="'blockwise' computes whole rows"):
            attention.attend(q, k[:, :keys], v[:, :keys], mask, "blockwise")


def test_tokamax_is_refused_without_it_and_in_unknown_versions(monkeypatch):
    def version(_):
        raise tokamax.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(tokamax.importlib.metadata, "version", version)
    with pytest.raises(ValueError, match="tokamax is not installed"):
        attention.choose("tokamax", LLM, "gpu")
    monkeypatch.setattr(tokamax.importlib.metadata, "version", lambda _: "0.0.99")
    with pytest.raises(ValueError, match=r"tokamax 0\.0\.99"):
        attention.choose("tokamax", LLM, "gpu")


def leaking(q, k, v, mask, scale, softcap):
    """Ignores segments, as some fused kernels do."""
    whole = mask.replace(
        q_segments=jnp.ones_like(mask.q_segments), kv_segments=jnp.ones_like(mask.kv_segments)
    )
    return xla.attend(q, k, v, whole, scale, softcap)


def without_window(q, k, v, mask, scale, softcap):
    return xla.attend(q, k, v, mask.replace(window=None), scale, softcap)


def without_gradient(q, k, v, mask, scale, softcap):
    return xla.attend(q, jax.lax.stop_gradient(k), v, mask, scale, softcap)


def without_output(q, k, v, mask, scale, softcap):
    return q * jnp.nan


def broken(q, k, v, mask, scale, softcap):
    raise NotImplementedError("this card is too old")


@pytest.mark.parametrize(
    ("attend", "dtype", "message"),
    [
        (leaking, "float32", "largest difference"),
        (leaking, "bfloat16", "largest difference"),
        (without_window, "bfloat16", "largest difference"),
        (without_gradient, "float32", "largest difference is 1 "),
        (without_output, "float32", "largest difference is nan"),
        (broken, "float32", "NotImplementedError: this card is too old"),
    ],
)
def test_a_backend_that_computes_something_else_is_stopped(attend, dtype, message, monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "splash", tiny.interpreted_splash()._replace(attend=attend))
    use = Use(4, 2, 16, dtype, window=4096)
    with pytest.raises(selfcheck.BackendError, match=rf"'splash' \(jax .*{message}.*model.attention=xla"):
        selfcheck.self_check([("xla", use), ("splash", use)])


def wrong_in_odd_rows(q, k, v, mask, scale, softcap):
    out = xla.attend(q, k, v, mask, scale, softcap)
    return out * (1 - q.shape[1] % 2)


@pytest.mark.parametrize("use", [TOWER, Use(4, 2, 16, "bfloat16", length=2049)])
def test_odd_rows_are_checked_where_the_model_has_them(use, monkeypatch):
    monkeypatch.setitem(
        attention.BACKENDS, "splash", tiny.interpreted_splash()._replace(attend=wrong_in_odd_rows)
    )
    selfcheck.self_check([("splash", dataclasses.replace(use, length=use.length - 1))])
    with pytest.raises(selfcheck.BackendError, match="largest difference is 1 "):
        selfcheck.self_check([("splash", use)])


def test_splash_passes_its_own_check(monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "splash", tiny.interpreted_splash())
    selfcheck.self_check([("splash", Use(2, 1, 16, "bfloat16", window=4096))])


def test_cudnn_gets_the_segments_as_a_mask(monkeypatch):
    """What is lowered for a GPU: fused forward and backward calls with a bias, and no array of all logits."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    segments = jnp.ones((2, 33), jnp.int32)
    packed = AttentionMask(segments, segments, window=9)

    def loss(mask, *arrays):
        return cudnn.attend(*arrays, mask, 0.4, None).astype(jnp.float32).sum()

    for mask, length, biased in ((packed, 33, True), (None, 33, True), (None, 34, False)):
        q, k = (jax.ShapeDtypeStruct((2, length, heads, 16), jnp.bfloat16) for heads in (4, 2))
        step = jax.jit(jax.grad(functools.partial(loss, mask), (0, 1, 2)))
        text = step.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
        kind = "ScaleBiasSoftmax" if biased else "Softmax"
        assert f"__cudnn$fmha{kind}(" in text
        assert f"__cudnn$fmha{kind}Backward(" in text
        assert ("tensor<2x1x34x34x" in text) == biased
        assert "x4x34x34x" not in text
