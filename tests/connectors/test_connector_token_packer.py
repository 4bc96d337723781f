"""token_packer: regions cut out by unfold, attention by torch's own multi-head attention."""

import pytest
from connector_testing import Case, on_grids

from mllm_jax import connectors

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, image, linear, mlp, norm  # noqa: E402

SMALL = {"hidden": 12, "heads": 3}
CASES = [
    Case("token_packer", SMALL),
    Case("token_packer", SMALL | {"factor": 4, "layers": (0, 5, 2)}),
    Case("token_packer", SMALL | {"factor": 3, "layers": (1,)}),
]


def oracle(c, p, states, grid):
    out = (grid[0] // c.factor, grid[1] // c.factor)
    coarse = F.interpolate(image(states[c.vision.select_layer], grid), size=out, mode="bilinear")
    q = norm(linear(coarse.flatten(2).transpose(1, 2), p["query"]), p["query_norm"], 1e-6)
    details = torch.cat([states[k] for k in c.layers or (3, 5)], dim=-1)
    regions = []
    for name in ("key", "value"):
        x = linear(F.gelu(linear(details, p[f"{name}_0"])), p[f"{name}_1"])
        x = image(norm(x, p[f"{name}_norm"], 1e-6), grid)
        x = F.unfold(x, c.factor, stride=c.factor).unflatten(1, (c.hidden, -1))  # [B, E, r * r, M]
        regions.append(x.permute(2, 0, 3, 1).flatten(1, 2))
    mha = torch.nn.MultiheadAttention(c.hidden, c.heads)
    mha.in_proj_weight.copy_(torch.cat([p[n]["kernel"].T for n in ("q", "k", "v")]))
    mha.in_proj_bias.copy_(torch.cat([p[n]["bias"] for n in ("q", "k", "v")]))
    mha.out_proj.weight.copy_(p["out"]["kernel"].T)
    mha.out_proj.bias.copy_(p["out"]["bias"])
    x = mha(q.flatten(0, 1)[None], *regions, need_weights=False)[0]
    return mlp(x.reshape(q.shape), p)


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    factor = case.options.get("factor", 2)
    if grid[0] % factor or grid[1] % factor:
        with pytest.raises(ValueError, match=rf"token_packer.factor={factor} does not divide the {grid[0]}x"):
            case.create(grid)
        return
    check(case, oracle, grid)


def test_detail_layers():
    def layers(depth, select):
        spec = connectors.VisionSpec(8, depth, select, (24, 24))
        return connectors.create("token_packer", spec, 8).detail_layers()

    assert layers(24, 23) == (12, 16, 22, 23)
    assert layers(27, 26) == (14, 18, 25, 26)
    assert layers(12, 11) == (6, 8, 11)


def test_impossible_options_say_so():
    with pytest.raises(ValueError, match=r"token_packer.heads=7 does not divide token_packer.hidden=1024"):
        Case("token_packer", {"heads": 7}).create((24, 24))
    with pytest.raises(
        ValueError, match=r"token_packer.layers=\(7,\) must be distinct indices of hs\[0..6\]"
    ):
        Case("token_packer", {"layers": (7,)}).create((24, 24))
