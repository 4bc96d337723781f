"""spatial_pool: every pooling of LLaVA-NeXT, before and after its projector."""

import pytest
from connector_testing import Case, on_grids

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, image, mlp, tokens  # noqa: E402

CASES = [
    Case("spatial_pool"),
    Case("spatial_pool", {"mode": "max"}),
    Case("spatial_pool", {"mode": "conv"}),
    Case("spatial_pool", {"mode": "conv", "stride": 3, "layers": 1}),
    Case("spatial_pool", {"mode": "bilinear"}),
    Case("spatial_pool", {"mode": "average", "position": "after", "stride": 3}),
    Case("spatial_pool", {"mode": "max", "position": "after"}),
    Case("spatial_pool", {"mode": "bilinear", "position": "after"}),
]


def pool(c, p, x, grid):
    """One of torch's own poolings."""
    x = image(x, grid)
    if c.mode == "average":
        return tokens(F.avg_pool2d(x, c.stride))
    if c.mode == "max":
        return tokens(F.max_pool2d(x, c.stride))
    if c.mode == "conv":
        kernel = p["conv"]["kernel"].permute(3, 2, 0, 1)
        return tokens(F.conv2d(x, kernel, p["conv"]["bias"], c.stride))
    size = [-(-side // c.stride) for side in grid]
    return tokens(F.interpolate(x, size=size, mode="bilinear"))


def oracle(c, p, states, grid):
    x = states[c.vision.select_layer]
    if c.position == "after":
        return pool(c, p, mlp(x, p, c.layers), grid)
    return mlp(pool(c, p, x, grid), p, c.layers)


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


@pytest.mark.parametrize(
    ("mode", "grid", "count"),
    [
        ("average", (24, 24), 144),
        ("average", (27, 27), 169),
        ("bilinear", (27, 27), 196),
        ("max", (27, 27), 169),
    ],
)
def test_token_counts_of_the_originals(mode, grid, count):
    assert Case("spatial_pool", {"mode": mode}).create(grid).num_tokens(grid) == count


def test_what_cannot_be_pooled_says_so():
    with pytest.raises(ValueError, match=r'mode="conv" comes before the projector'):
        Case("spatial_pool", {"mode": "conv", "position": "after"}).create((24, 24))
    with pytest.raises(ValueError, match=r"stride=13 is more than the 12x20 patch grid"):
        Case("spatial_pool", {"stride": 13}).create((12, 20))
