"""Fine features that are mined: sizes at published geometry, what each way to combine mines, gradients, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import connectors
from mllm_jax.connectors.base import VisionFeatures, VisionSpec
from mllm_jax.connectors.mining import Mining
from mllm_jax.interop import native
from mllm_jax.models import mllm
from mllm_jax.models.convnext import ConvNextConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.paths import count, flatten
from mllm_jax.models.vit import VisionConfig
from mllm_jax.parallel.sharding import spec_of

LLM = DecoderConfig(
    vocab=11, width=64, depth=1, heads=2, kv_heads=2, head_width=32, mlp_width=64, max_positions=4096
)
CLIP = VisionConfig(width=1024, depth=24, heads=16, mlp_width=4096, patch=14, image_size=336)
LARGE = ConvNextConfig((192, 384, 768, 1536), (3, 3, 27, 3), 320)
NARROW = ConvNextConfig((8, 12), (1, 2), 64)
SMALL = VisionConfig(width=16, depth=3, heads=2, mlp_width=24, patch=4, image_size=16)


def mini_gemini(**changes):
    """Mini-Gemini's encoders with a small LLM."""
    vision = EncodersConfig((CLIP, LARGE), (336, 768), "mining")
    return mllm.ModelConfig(
        dataclasses.replace(vision, **changes), LLM, max(changes.get("image_sizes", (768,)))
    )


def test_published_sizes():
    model = mini_gemini()
    params = mllm.abstract_params(model)
    assert count(params["vision"]["tower_1"]) == 196_227_264
    assert count(params["connector"]["mining"]) == 6_963_456
    assert model.visual_layout.slot.num_tokens == 576
    assert model.vision_spec.fine == (64, 2880)
    # Keys and values of all 576 x 64 positions would be 2 x 217 GFLOPs; the plain connector is below one.
    assert 1e9 < model.make_connector().flops((24, 24)) < 10e9
    high = mini_gemini(image_sizes=(336, 1536), split=2, overview=True)
    assert high.visual_layout.slot.num_tokens == 2880
    assert high.slot_size == (1536, 1536)
    assert high.vision_spec.fine == (64, 2880)
    assert mllm.abstract_params(high) == params
    for path in flatten(params):
        spec_of(path)  # exactly one sharding rule each
    assert native.model_from_json(json.loads(json.dumps(native.model_to_json(high)))) == high


def features(batch=2, cells=4):
    rng = np.random.default_rng(0)
    states = {k: jnp.asarray(rng.normal(size=(batch, 9, 16)), jnp.float32) for k in range(3)}
    means = tuple(jnp.asarray(rng.normal(size=(batch, 9, 16)), jnp.float32) for _ in range(2))
    fine = jnp.asarray(rng.normal(size=(batch, 9, cells, 20)), jnp.float32)
    return VisionFeatures(states, means, (3, 3), fine=fine)


def run(name, mining, given, **options):
    """(parameters, tokens) of a connector."""
    connector = connectors.create(name, VisionSpec(16, 3, 2, (3, 3), mining), 12, options)
    params = connector.init(jax.random.key(0), given)["params"]
    return params, connector.apply({"params": params}, given)


@pytest.mark.parametrize("mining", ["selected", "all", "channels"])
def test_what_is_mined_in_the_dense_connector(mining):
    given = features()
    params, tokens = run("dci", mining, given)
    mine = params.pop("mining")

    def mined(x):
        return Mining().apply({"params": mine}, x, given.fine)

    states = [given.hidden[2], *given.means]
    if mining == "channels":
        assert mine["query"]["kernel"].shape == (48, 48)
        expected = mined(jnp.concatenate(states, axis=-1))
    else:
        assert mine["query"]["kernel"].shape == (16, 16)
        rest = states[1:] if mining == "selected" else map(mined, states[1:])
        expected = jnp.concatenate([mined(states[0]), *rest], axis=-1)
    # The same channels without fine features, through the same projector.
    plain = connectors.create("mlp2x_gelu", VisionSpec(48, 3, 2, (3, 3)), 12)
    again = plain.apply({"params": params}, VisionFeatures({2: expected}, (), (3, 3)))
    np.testing.assert_allclose(tokens, again, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in connectors.CONNECTORS if n not in ("dci", "sci")])
def test_every_connector_mines_f(name):
    """With fine features tokens depend on them; the parameters are the connector's own and those of mining."""
    options = {"tokens": 4} if "tokens" in connectors.options(name) else {}
    spec = VisionSpec(16, 3, 2, (4, 4), "selected")
    rng = np.random.default_rng(1)
    states = {k: jnp.asarray(rng.normal(size=(1, 16, 16)), jnp.float32) for k in range(4)}
    fine = jnp.asarray(rng.normal(size=(1, 16, 4, 20)), jnp.float32)
    connector = connectors.create(name, spec, 12, options)
    shapes = jax.eval_shape(connector.init, jax.random.key(0), VisionFeatures(states, (), (4, 4), fine=fine))[
        "params"
    ]
    plain = connectors.create(name, dataclasses.replace(spec, mining=""), 12, options)
    own = jax.eval_shape(plain.init, jax.random.key(0), VisionFeatures(states, (), (4, 4)))["params"]
    assert shapes.pop("mining")["key"]["kernel"].shape == (20, 16)
    assert shapes == own


def test_gradients_reach_all_of_mining_but_the_bias_that_cancels():
    given = features()
    connector = connectors.create("mlp2x_gelu", VisionSpec(16, 3, 2, (3, 3), "selected"), 12)
    params = connector.init(jax.random.key(0), given)["params"]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 9, 12)), jnp.float32)
    grads = jax.grad(lambda p: (connector.apply({"params": p}, given) * weights).sum())(params)["mining"]
    sizes = {path: float(jnp.abs(leaf).max()) for path, leaf in flatten(grads).items()}
    cancels = {"key/bias", "key/norm_bias"}  # the same for all positions of a cell
    assert all(size < 1e-5 for path, size in sizes.items() if path in cancels)
    assert all(size > 1e-5 for path, size in sizes.items() if path not in cancels), sizes


@pytest.mark.slow
def test_views_are_the_parts_of_the_image_and_the_whole():
    """Encoders see crops: an image whose parts differ gives as tokens of a view those of the part alone."""
    vision = EncodersConfig((SMALL, NARROW), (16, 64), "mining", 2, True)
    model = mllm.ModelConfig(vision, LLM, 64, select_layer=-1, vision_remat="none")
    assert model.visual_layout.slot.num_tokens == 5 * 16
    params = mllm.init(model, jax.random.key(0))
    image = np.random.default_rng(4).integers(0, 256, (64, 64, 3), np.uint8)
    halves = [image[:32, :32], image[:32, 32:], image[32:, :32], image[32:, 32:]]

    def tokens(model, image):
        spec = mllm.batch_spec(model, 1, length=8).empty()
        spec.images[0, 0], spec.image_mask[:] = image, True
        return jax.jit(lambda p, b: mllm.apply(model, p, b, method="visual_tokens"))(params, spec)[0]

    found = tokens(model, image).reshape(5, 16, -1)
    single = dataclasses.replace(
        model, vision=EncodersConfig((SMALL, NARROW), (16, 32), "mining"), image_size=32
    )
    alone = np.stack([tokens(single, half) for half in halves])
    # Not equal: convolutions and resizing see across the edges of a part. But each view is far nearer to its own part.
    distance = np.abs(np.asarray(found[1:])[:, None] - alone[None]).mean(axis=(2, 3))
    assert (distance.argmin(axis=1) == np.arange(4)).all(), distance


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({"image_sizes": (16,)}, 16, "one size for each of 2 encoders"),
        ({"image_sizes": (16, 64)}, 32, "must be the largest of .*: 64"),
        ({"image_sizes": (16, 40)}, 40, "no whole number of fine features per token"),
        ({"image_sizes": (16, 64), "combine": "channels"}, 64, "have different patch grids"),
        ({"combine": "sum"}, 64, "vision.combine='sum'; valid: channels, tokens, mining"),
        ({"split": 2}, 64, "vision.split=2 needs vision.image_sizes"),
        ({"image_sizes": (16, 64), "overview": True}, 64, "needs vision.split > 1"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(fields, size, message):
    with pytest.raises(ValueError, match=message):
        EncodersConfig((SMALL, NARROW), **{"combine": "mining"} | fields).grid(size)
    with pytest.raises(ValueError, match=r"mining_all"):
        connectors.create("dci", VisionSpec(16, 3, 2, (3, 3), "all"), 12, {"learnable": True})
