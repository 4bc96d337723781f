"""LoRA and int8 storage as transforms of the parameter tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax.models import lora, quantize
from mllm_jax.models.decoder import Decoder, DecoderConfig
from mllm_jax.models.lora import LoRA
from mllm_jax.models.paths import flatten

CONFIG = DecoderConfig(vocab=17, width=12, depth=3, heads=2, kv_heads=1, head_width=6, mlp_width=10)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 5)))


def logits(params, adapters=None, rng=None, dtype=jnp.float32, remat="none"):
    """All logits of a batch."""

    def run(decoder):
        positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
        hidden, _ = decoder(decoder.embed(TOKENS), positions, jnp.ones_like(TOKENS))
        return decoder.logits(hidden)

    rngs = None if rng is None else {"dropout": rng}
    model = Decoder(CONFIG, dtype=dtype, lora=adapters, remat=remat)
    return jax.jit(lambda p: model.apply({"params": p["llm"]}, method=run, rngs=rngs))(params)


@pytest.fixture(scope="module")
def base():
    def run(decoder):
        hidden, _ = decoder(decoder.embed(TOKENS), TOKENS, TOKENS)
        return decoder.logits(hidden)

    params = jax.jit(lambda key: Decoder(CONFIG).init(key, method=run))(jax.random.key(0))["params"]
    return {"llm": jax.tree.map(lambda x: x * 3, params)}


def random_adapters(params, config, dtype=jnp.float32):
    """Adapters with B not zero."""
    added = lora.add(params, config, jax.random.key(1), dtype)
    keys = iter(jax.random.split(jax.random.key(2), 100))
    flat = flatten(added)
    flat = {
        path: 0.3 * jax.random.normal(next(keys), leaf.shape, leaf.dtype) if path.endswith("lora_b") else leaf
        for path, leaf in flat.items()
    }
    return lora.unflatten(flat)


def test_fresh_adapters_change_nothing_and_have_the_right_shapes(base):
    config = LoRA(rank=4, alpha=8, dropout=0.0)
    added = lora.add(base, config, jax.random.key(1))
    np.testing.assert_array_equal(logits(added, config), logits(base))
    flat = flatten(added)
    assert flat["llm/blocks/down/lora_a"].shape == (3, 10, 4)
    assert flat["llm/blocks/down/lora_b"].shape == (3, 4, 12)
    bound = 1 / np.sqrt(10)
    assert 0.8 * bound < float(jnp.abs(flat["llm/blocks/down/lora_a"]).max()) <= bound
    targets = [path for path in flat if path.endswith("lora_a")]
    assert len(targets) == 7  # q, k, v, o, gate, up, down
    _, adapters = lora.split(added)
    assert set(flatten(adapters)) == {
        p.replace("kernel", x) for p in lora.target_paths(base, config) for x in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize("stabilized", [False, True])
def test_adapters_equal_merged_weights(base, stabilized):
    config = LoRA(
        rank=2, alpha=6, dropout=0.0, targets=r"llm/blocks/(q|down)/kernel", rank_stabilized=stabilized
    )
    added = random_adapters(base, config)
    assert config.scale == pytest.approx(6 / np.sqrt(2) if stabilized else 3)
    merged = lora.merge(added, config)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    a, b = (np.asarray(flatten(added)[f"llm/blocks/q/{n}"], np.float64) for n in ("lora_a", "lora_b"))
    expected = np.asarray(flatten(base)["llm/blocks/q/kernel"]) + config.scale * a @ b
    np.testing.assert_allclose(flatten(merged)["llm/blocks/q/kernel"], expected, atol=1e-6)
    assert float(jnp.abs(logits(added, config) - logits(base)).max()) > 0.1
    np.testing.assert_allclose(logits(added, config), logits(merged), atol=1e-5)


def test_gradients_reach_adapters_only_through_the_split(base):
    config = LoRA(rank=2, alpha=2, dropout=0.0)
    added = lora.add(base, config, jax.random.key(1))
    frozen, adapters = lora.split(added)

    def loss(adapters):
        flat = {**flatten(frozen), **flatten(adapters)}
        return jnp.square(logits(lora.unflatten(flat), config, remat="full")).sum()

    gradients = flatten(jax.grad(loss)(adapters))
    assert all(path.endswith(("lora_a", "lora_b")) for path in gradients)
    assert all(
        float(jnp.abs(g).max()) == 0 for path, g in gradients.items() if path.endswith("lora_a")
    )  # B = 0
    assert all(float(jnp.abs(g).max()) > 0 for path, g in gradients.items() if path.endswith("lora_b"))


def test_dropout_only_with_a_key(base):
    config = LoRA(rank=2, alpha=6, dropout=0.5)
    added = random_adapters(base, config)
    plain = logits(added, config)
    np.testing.assert_array_equal(plain, logits(added, dataclasses.replace(config, dropout=0.0)))
    one, same, two = (logits(added, config, jax.random.key(k)) for k in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, two)
    assert not np.allclose(one, plain)
    # Its expectation is no dropout, seen at the first adapted layer's update alone.
    x = jnp.ones((1, 12))
    from mllm_jax.models.layers import Dense

    layer = Dense(3, use_bias=False, lora=config)
    params = {"kernel": jnp.zeros((12, 3)), "lora_a": jnp.ones((12, 2)), "lora_b": jnp.ones((2, 3))}
    keys = jax.random.split(jax.random.key(0), 400)
    many = jax.vmap(lambda key: layer.apply({"params": params}, x, rngs={"dropout": key}))(keys)
    np.testing.assert_allclose(many.mean(0), layer.apply({"params": params}, x), rtol=0.05)


def test_wrong_use_is_an_error(base):
    with pytest.raises(ValueError, match=r"lora.targets='llm/nothing' matches no kernel"):
        lora.add(base, LoRA(targets="llm/nothing"), jax.random.key(0))
    added = lora.add(base, LoRA(rank=2), jax.random.key(0))
    with pytest.raises(ValueError, match="adapted already"):
        lora.add(added, LoRA(rank=2), jax.random.key(0))
    with pytest.raises(ValueError, match="config has no lora"):
        logits(added)


def test_int8_storage_is_close_and_small(base):
    stored = quantize.quantize(base, r"llm/blocks/.*/kernel")
    flat, original = flatten(stored), flatten(base)
    kernel, scale = flat["llm/blocks/up/kernel"], flat["llm/blocks/up/kernel_scale"]
    assert kernel.dtype == jnp.int8
    assert scale.shape == (3, 10)
    step = np.asarray(scale)[:, None]
    error = np.abs(np.asarray(kernel, np.float32) * step - np.asarray(original["llm/blocks/up/kernel"]))
    assert (error <= step / 2 + 1e-6).all()
    widened = {k: v for k, v in flat.items() if not k.endswith("_scale")}
    for path in widened:
        if f"{path}_scale" in flat:
            widened[path] = flat[path].astype(jnp.float32) * flat[f"{path}_scale"][..., None, :]
    np.testing.assert_allclose(logits(stored), logits(lora.unflatten(widened)), atol=1e-4)
    config = LoRA(rank=2, alpha=6, dropout=0.0)
    assert np.isfinite(logits(random_adapters(stored, config), config)).all()
    with pytest.raises(ValueError, match="int8; merge into the original weights"):
        lora.merge(random_adapters(stored, config), config)
    with pytest.raises(ValueError, match="matches no kernel"):
        quantize.quantize(base, "vision/.*")
