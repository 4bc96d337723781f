"""perceiver: both published variants, from the definition in torch."""

import pytest
from connector_testing import Case, on_grids

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, linear, mlp, norm  # noqa: E402

SMALL = {"tokens": 7, "depth": 2, "heads": 3, "head_width": 4}
CASES = [
    Case("perceiver", SMALL),
    Case("perceiver", SMALL | {"variant": "next", "mlp_ratio": 2}),
]


def oracle(c, p, states, grid):
    patches = states[c.vision.select_layer]
    if c.variant == "tlf":
        patches = linear(patches, p["input"])
    z = p["latents"].expand(len(patches), -1, -1)
    for i in range(c.depth):
        b = p[f"block_{i}"]
        n = norm(z, b["latent_norm"])
        keys = torch.cat([norm(patches, b["patch_norm"]), n], dim=1)
        q, k, v = (
            linear(a, b[m]).unflatten(-1, (c.heads, -1)) for a, m in ((n, "q"), (keys, "k"), (keys, "v"))
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q * c.head_width**-0.5, k)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        z = z + linear(y, b["out"])
        z = z + linear(F.gelu(linear(norm(z, b["mlp_norm"]), b["fc1"])), b["fc2"])
    z = norm(z, p["final_norm"])
    return z if c.variant == "tlf" else mlp(z, p, c.layers)


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


def test_unknown_variant_says_so():
    with pytest.raises(ValueError, match="valid: 'tlf', 'next'"):
        Case("perceiver", {"variant": "flamingo"}).create((24, 24))
