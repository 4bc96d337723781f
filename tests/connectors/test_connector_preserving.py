"""linear, mlp{n}x_gelu, and the bilinear reduction after the MLP."""

import pytest
from connector_testing import Case, on_grids

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, image, mlp, tokens  # noqa: E402

CASES = [
    Case("linear"),
    Case("mlp1x_gelu"),
    Case("mlp2x_gelu"),
    Case("mlp3x_gelu"),
    Case("linear", {"reduction": 2}),
    Case("mlp2x_gelu", {"reduction": 4}),
    Case("mlp2x_gelu", {"reduced_grid": (11, 7)}),
]


def oracle(c, p, states, grid):
    layers = 1 if type(c).__name__ == "Linear" else c.layers
    x = mlp(states[c.vision.select_layer], p, layers)
    out = c.reduced_grid or (grid[0] // c.reduction, grid[1] // c.reduction)
    return tokens(
        F.interpolate(image(x, grid), size=out, mode="bilinear", align_corners=False, antialias=False)
    )


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    if grid[0] % case.options.get("reduction", 1):
        with pytest.raises(
            ValueError, match=r"reduction=\d does not divide the 27x27 patch grid.*reduced_grid"
        ):
            case.create(grid)
        return
    check(case, oracle, grid)
