"""ldp and ldpv2: MobileVLM's projectors from the definition in torch."""

import pytest
from connector_testing import Case, on_grids

from mllm_jax.connectors.ldp import squeeze_width

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, conv2d, image, mlp, norm2d, tokens  # noqa: E402

CASES = [
    Case("ldp", llm=16),
    Case("ldpv2"),
    Case("ldpv2", {"tokens": 64}),
]


def oracle(c, p, states, grid):
    x = image(mlp(states[c.vision.select_layer], p), grid)
    if type(c).__name__ == "LDPv2":
        side = round(c.tokens**0.5)
        x = F.adaptive_avg_pool2d(x, (side, side))
        return tokens(x + conv2d(x, p["peg"], groups=c.width))
    for i, stride in enumerate((1, 2)):
        b = p[f"block_{i}"]
        y = F.hardswish(norm2d(conv2d(x, b["depthwise"], stride, groups=c.width), b["depthwise_norm"]))
        gate = F.relu(conv2d(F.adaptive_avg_pool2d(y, 1), b["squeeze"]))
        y = y * F.hardsigmoid(conv2d(gate, b["excite"]))
        y = norm2d(conv2d(y, b["pointwise"]), b["pointwise_norm"])
        x = x + y if stride == 1 else y
    return tokens(x)


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


def test_token_counts():
    ldp = Case("ldp").create((24, 24))
    assert [ldp.num_tokens(g) for g in ((16, 16), (24, 24), (32, 32), (27, 27))] == [64, 144, 256, 196]


def test_squeeze_widths_are_torchvisions():
    # a quarter rounded to a multiple of 8, up when rounding down would lose more than a tenth
    assert [squeeze_width(n) for n in (2048, 4096, 16, 48, 336)] == [512, 1024, 8, 16, 88]


def test_ldpv2_token_count_must_be_a_square_within_the_grid():
    with pytest.raises(ValueError, match=r"ldpv2.tokens=140 is not a perfect square"):
        Case("ldpv2", {"tokens": 140}).create((24, 24))
    with pytest.raises(ValueError, match="cannot be pooled from a 8x24"):
        Case("ldpv2").create((8, 24))
