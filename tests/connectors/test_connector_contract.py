"""What every row of the table keeps: names, options, dtypes, dropout, gradients, shapes without tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from connector_testing import Case, parameters

from mllm_jax import connectors

TINY = {
    "average_pool": {"tokens": 4},
    "q_former": {"tokens": 5, "hidden": 8, "depth": 2, "heads": 2, "mlp": 8},
    "resampler": {"tokens": 5, "hidden": 8, "depth": 2, "heads": 2, "mlp": 8},
    "perceiver": {"tokens": 5, "depth": 1, "heads": 2, "head_width": 4},
    "c_abstractor": {"tokens": 4, "depth": 1, "hidden": 8},
    "d_abstractor": {"tokens": 4, "depth": 1, "hidden": 8, "heads": 2, "mlp": 8},
    "ldpv2": {"tokens": 4},
    "token_packer": {"hidden": 8, "heads": 2},
}
DROPOUT = ("q_former", "resampler", "d_abstractor")
GRID = (6, 4)


def built(name, options=None, **kwargs):
    """The connector, a jitted apply, random parameters and features."""
    case = Case(name, TINY.get(name, {}) | (options or {}), llm=16)
    connector = case.create(GRID, **kwargs)
    states = [jnp.asarray(s) for s in case.states(GRID)]
    features = connectors.collect(connector.request(), states, GRID)
    params = {"params": jax.tree.map(jnp.asarray, parameters(connector, GRID))}
    return connector, jax.jit(connector.apply, static_argnums=2), params, features


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_differentiates_in_every_parameter(name):
    connector, _, params, features = built(name)

    @jax.jit
    def loss(params):
        out = connector.apply(params, features)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.grad(loss, has_aux=True)(params)
    assert out.shape == (2, connector.num_tokens(GRID), 16)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_bfloat16_computes_in_bfloat16_and_stays_close(name):
    _, apply, params, features = built(name)
    exact = apply(params, features, True)
    half, apply, _, _ = built(name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    features = jax.tree.map(lambda x: x.astype(jnp.bfloat16), features)
    shapes = jax.eval_shape(half.init, jax.random.key(0), features)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
    out = apply(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), features, True)
    assert out.dtype == jnp.bfloat16
    difference = np.asarray(out, np.float32) - np.asarray(exact)
    assert np.sqrt(np.mean(difference**2)) < 0.05 * np.std(exact)


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_dropout_only_when_not_deterministic(name):
    _, apply, params, features = built(name)
    still = apply(params, features, True)
    first, again, second = (
        apply(params, features, False, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert bool((first != second).any()) == bool((first != still).any()) == (name in DROPOUT)


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_rate_zero_is_deterministic(name):
    _, apply, params, features = built(name, {"dropout": 0.0})
    rngs = {"dropout": jax.random.key(1)}
    np.testing.assert_allclose(
        apply(params, features, True), apply(params, features, False, rngs=rngs), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_names_options_and_defaults(name):
    cls, fixed = connectors.CONNECTORS[name]
    defaults = connectors.options(name)
    assert not set(defaults) & {"vision", "width", "dtype", "param_dtype", "name", "parent", *fixed}
    assert {type(v) for v in defaults.values()} <= {
        int,
        float,
        bool,
        str,
        tuple,
    }  # settable from a command line
    given = connectors.create(name, connectors.VisionSpec(1024, 24, 23, (24, 24)), 4096, defaults)
    assert given == connectors.create(name, connectors.VisionSpec(1024, 24, 23, (24, 24)), 4096)
    assert type(given) is cls


def test_unknown_names_and_options_name_the_nearest():
    spec = connectors.VisionSpec(8, 6, 5, GRID)
    with pytest.raises(
        ValueError, match=r"unknown connector 'mlp2_gelu'; did you mean 'mlp2x_gelu'\? valid: lin"
    ):
        connectors.create("mlp2_gelu", spec, 8)
    with pytest.raises(ValueError, match=r"'linear' has no option 'layers'; valid: reduction, reduced_grid"):
        connectors.create("linear", spec, 8, {"layers": 2})
    with pytest.raises(ValueError, match=r"no option 'layers'"):
        connectors.create("mlp2x_gelu", spec, 8, {"layers": 3})  # fixed by the name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "average_pool",
            {"tokens": "144"},
            "'tokens' of connector 'average_pool' must be of type int, not '144'",
        ),
        ("average_pool", {"tokens": True}, "must be of type int, not True"),
        ("sti", {"layers": 7}, "'layers' of connector 'sti' must be of type tuple of integers, not 7"),
        ("sti", {"layers": [7, "15"]}, "must be of type tuple of integers"),
        ("dci", {"learnable": 1}, "must be of type bool, not 1"),
        ("q_former", {"dropout": -0.1}, "'dropout' of connector 'q_former' must be at least 0"),
        ("average_pool", {"tokens": 0}, "must be at least 1, not 0"),
    ],
)
def test_option_values_of_the_wrong_type_say_so(name, options, message):
    with pytest.raises(ValueError, match=message):
        connectors.create(name, connectors.VisionSpec(8, 20, 19, (16, 16)), 8, options)


def test_lists_and_whole_numbers_are_taken_where_they_fit():
    spec = connectors.VisionSpec(8, 20, 19, (16, 16))
    assert connectors.create("sti", spec, 8, {"layers": [7, 15]}).layers == (7, 15)
    assert connectors.create("q_former", spec, 8, {"dropout": 0}).dropout == 0.0


def test_whole_numbers_whose_default_is_not_positive_may_be_that(monkeypatch):
    class Shifted(connectors.CONNECTORS["linear"][0]):
        shift: int = 0
        layer: int = -2

    monkeypatch.setitem(connectors.CONNECTORS, "shifted", (Shifted, {}))
    spec = connectors.VisionSpec(8, 20, 19, (16, 16))
    made = connectors.create("shifted", spec, 8, connectors.options("shifted"))
    assert (made.shift, made.layer) == (0, -2)
    with pytest.raises(ValueError, match="'shift' of connector 'shifted' must be at least 0, not -1"):
        connectors.create("shifted", spec, 8, {"shift": -1})


@pytest.mark.slow
def test_initial_scales_are_the_originals():
    """torch's default within 1/sqrt(fan in) for LLaVA-like projectors, N(0, 0.02) for Honeybee's and BERT's."""
    case = Case("mlp2x_gelu", width=64, llm=256)
    state = jnp.zeros((1, 24, 64))
    features = connectors.collect(case.create(GRID).request(), [state] * 7, GRID)
    params = case.create(GRID).init(jax.random.key(0), features)["params"]
    for layer, fan_in in (("layer_0", 64), ("layer_1", 256)):
        for leaf in params[layer].values():
            bound = fan_in**-0.5
            assert 0.9 * bound < np.abs(leaf).max() <= bound
            assert abs(np.std(leaf) - bound / 3**0.5) < 0.1 * bound
    case = Case("c_abstractor", {"tokens": 4, "depth": 1, "hidden": 64}, width=64, llm=256)
    params = case.create(GRID).init(jax.random.key(0), features)["params"]
    for leaf in (params["stage1_0"]["conv1"], params["stage2_0"]["conv2"], params["layer_1"]):
        assert 0.018 < np.std(leaf["kernel"]) < 0.022
        assert not np.any(leaf.get("bias", 0))
