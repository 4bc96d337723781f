"""resampler: Honeybee's definition in torch; why its queries do not start at zero here."""

import jax
import numpy as np
import pytest
from connector_testing import Case, on_grids

from mllm_jax import connectors

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import attention, check, linear, norm  # noqa: E402

SMALL = {"tokens": 9, "hidden": 12, "depth": 3, "heads": 3, "mlp": 20}
CASES = [
    Case("resampler", SMALL),
    Case("resampler", SMALL | {"position_table": True, "end_tokens": 2}),
]


def oracle(c, p, states, grid):
    patches = states[c.vision.select_layer]
    if c.position_table:
        patches = patches + p["position_table"]
    patches = linear(patches, p["input"])
    x = p["queries"].expand(len(patches), -1, -1)
    for i in range(c.depth):
        b = p[f"block_{i}"]
        q = norm(x, b["query_norm"])
        keys = torch.cat([q, norm(patches, b["patch_norm"])], dim=1)
        y = attention(linear(q, b["q"]), linear(keys, b["k"]), linear(keys, b["v"]), c.heads)
        y = q + linear(y, b["out"])
        z = norm(y, b["mlp_norm"])
        z = norm(F.silu(linear(z, b["w1"])) * linear(z, b["w3"]), b["inner_norm"], 1e-6)
        x = y + linear(z, b["w2"])
    x = linear(x, p["output"])
    if c.end_tokens:
        x = torch.cat([x, p["end_tokens"].expand(len(x), -1, -1)], dim=1)
    return x


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


@pytest.mark.parametrize(("std", "distinct"), [(0.0, False), (0.02, True)])
def test_zero_queries_would_all_give_the_same_token(std, distinct):
    case, grid = Case("resampler", SMALL | {"query_std": std}), (12, 20)
    connector = case.create(grid)
    features = connectors.collect(
        connector.request(), [jax.numpy.asarray(s) for s in case.states(grid)], grid
    )
    params = connector.init(jax.random.key(0), features)
    tokens = np.asarray(connector.apply(params, features))
    assert bool(np.abs(tokens - tokens[:, :1]).max() > 1e-4) == distinct


def test_position_table_is_for_one_grid():
    connector = Case("resampler", SMALL | {"position_table": True}).create((16, 16))
    with pytest.raises(ValueError, match=r"made for a 16x16 patch grid and does not fit 24x24.*=False"):
        connector.num_tokens((24, 24))
    assert Case("resampler", SMALL).create((16, 16)).num_tokens((24, 24)) == 9


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"resampler.heads=5 does not divide resampler.hidden=12"):
        Case("resampler", SMALL | {"heads": 5}).create((16, 16))
