"""average_pool and the adaptive windows behind all pooling connectors."""

import numpy as np
import pytest
from connector_testing import Case, on_grids

from mllm_jax.connectors.grids import averaging_matrix

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, image, mlp, tokens  # noqa: E402

CASES = [
    Case("average_pool"),
    Case("average_pool", {"tokens": 64, "layers": 1}),
    Case("average_pool", {"tokens": 100, "mode": "1d"}),
]


def oracle(c, p, states, grid):
    x = states[c.vision.select_layer]
    if c.mode == "1d":
        x = F.adaptive_avg_pool1d(x.transpose(1, 2), c.tokens).transpose(1, 2)
    else:
        side = round(c.tokens**0.5)
        x = tokens(F.adaptive_avg_pool2d(image(x, grid), (side, side)))
    return mlp(x, p, c.layers)


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


def test_windows_are_those_of_the_reference():
    starts = {
        (16, 12): "0-2 1-3 2-4 4-6 5-7 6-8 8-10 9-11 10-12 12-14 13-15 14-16",
        (32, 12): "0-3 2-6 5-8 8-11 10-14 13-16 16-19 18-22 21-24 24-27 26-30 29-32",
        (27, 13): "0-3 2-5 4-7 6-9 8-11 10-13 12-15 14-17 16-19 18-21 20-23 22-25 24-27",
    }
    for (length, out), windows in starts.items():
        found = [np.flatnonzero(row) for row in averaging_matrix(length, out)]
        assert " ".join(f"{w[0]}-{w[-1] + 1}" for w in found) == windows


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"tokens": 140}, (24, 24), r"average_pool.tokens=140 is not a perfect square; .* 121 and 144"),
        ({"tokens": 169}, (12, 20), "cannot be pooled from a 12x20 patch grid"),
        ({"tokens": 300, "mode": "1d"}, (12, 20), "cannot be pooled from 240 patches"),
        ({"mode": "3d"}, (24, 24), "'mode' of connector 'average_pool' is '3d'; valid: '1d', '2d'"),
    ],
)
def test_impossible_pooling_says_so(options, grid, message):
    with pytest.raises(ValueError, match=message):
        Case("average_pool", options).create(grid)
