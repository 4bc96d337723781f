"""c_abstractor: RegNet blocks as convolutions on channels-first images."""

import pytest
from connector_testing import Case, on_grids

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, conv2d, image, linear, norm, norm2d, tokens  # noqa: E402

CASES = [
    Case("c_abstractor", {"hidden": 8}),
    Case("c_abstractor", {"hidden": 12, "depth": 2, "tokens": 64, "end_tokens": 1}),  # a shortcut convolution
    Case(
        "c_abstractor", {"depth": 0, "mlp_depth": 3, "tokens": 64, "prenorm": True, "position_table": False}
    ),
]


def regnet_block(x, b, features):
    y = F.silu(norm2d(conv2d(x, b["conv1"]), b["norm1"]))
    y = F.silu(norm2d(conv2d(y, b["conv2"], groups=features), b["norm2"]))
    gate = F.silu(conv2d(F.adaptive_avg_pool2d(y, 1), b["squeeze"]))
    y = y * conv2d(gate, b["excite"]).sigmoid()
    y = norm2d(conv2d(y, b["conv3"]), b["norm3"])
    if x.shape[1] != features:
        x = norm2d(conv2d(x, b["shortcut"]), b["shortcut_norm"])
    return F.silu(y + x)


def oracle(c, p, states, grid):
    x = states[c.vision.select_layer]
    if c.prenorm:
        x = norm(x, p["prenorm"], 1e-6)
    if c.position_table:
        x = x + p["position_table"]
    x = image(x, grid)
    for i in range(c.depth):
        x = regnet_block(x, p[f"stage1_{i}"], c.hidden)
    side = round(c.tokens**0.5)
    x = F.adaptive_avg_pool2d(x, (side, side))
    for i in range(c.depth):
        x = regnet_block(x, p[f"stage2_{i}"], c.hidden)
    x = tokens(x)
    for i in range(c.mlp_depth):
        x = linear(F.silu(x) if i else x, p[f"layer_{i}"])
    if c.end_tokens:
        x = torch.cat([x, p["end_tokens"].expand(len(x), -1, -1)], dim=1)
    return x


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


def test_token_count_and_grid_errors():
    with pytest.raises(ValueError, match=r"c_abstractor.tokens=150 is not a perfect square; .* 144 and 169"):
        Case("c_abstractor", {"tokens": 150}).create((24, 24))
    with pytest.raises(ValueError, match=r"c_abstractor.tokens=144 cannot be pooled from a 8x24"):
        Case("c_abstractor").create((8, 24))
    connector = Case("c_abstractor").create((24, 24))
    with pytest.raises(
        ValueError, match=r"24x24 patch grid and does not fit 16x16.*c_abstractor.position_table=False"
    ):
        connector.num_tokens((16, 16))
    free = Case("c_abstractor", {"position_table": False, "end_tokens": 2}).create((24, 24))
    assert free.num_tokens((16, 16)) == 146
