"""Dense Connector: sti, sci, dci and their learnable variants, from the definition over all hidden states."""

import itertools

import pytest
from connector_testing import Case, on_grids

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, conv2d, image, linear, mlp, norm, tokens  # noqa: E402

CASES = [
    Case("sti"),
    Case("sti", {"layers": (1, 3, 4), "window": 7}),
    Case("sti", {"learnable": True}),
    Case("sci"),
    Case("sci", {"layers": (4, 0, 2)}),
    Case("sci", {"learnable": True}),
    Case("dci"),
    Case("dci", {"groups": 3}),
    Case("dci", {"groups": 2, "edges": (1, 3, 6)}),
    Case("dci", {"learnable": True}),
    Case("dci", {"learnable": True, "reduced_grid": (6, 5)}),
    Case("sci", {"reduced_grid": (12, 16)}),
]


def oracle(c, p, states, grid):
    name, last = type(c).__name__, states[c.vision.select_layer]
    if name == "STI":
        extra = []
        for k in c.layers or (1, 3):
            x = states[k].transpose(1, 2)
            if c.learnable:
                x = F.conv1d(x, p["conv"]["kernel"].permute(2, 1, 0), p["conv"]["bias"], stride=c.window)
            else:
                x = F.avg_pool1d(x, c.window, c.window)
            extra.append(x.transpose(1, 2))
        return mlp(torch.cat([last, *extra], dim=1), p)
    if name == "SCI":
        used = [last, *(states[k] for k in c.layers or (1, 3))]
        if c.learnable:
            used = [tokens(conv2d(image(x, grid), p["conv"])) for x in used]
    else:
        used = [last]
        edges = c.edges or [g * 6 // c.groups for g in range(c.groups + 1)]
        for start, end in itertools.pairwise(edges):
            group = states[start:end]
            if c.learnable:  # as written: the shared Linear(LN(.)) on every state, then the mean
                affine = {"scale": p["norm_scale"], "bias": p["norm_bias"]}
                group = [linear(norm(x, affine), p["shared"]) for x in group]
            used.append(torch.stack(group).mean(0))
    x = mlp(torch.cat(used, dim=-1), p)
    if c.reduced_grid:
        x = tokens(F.interpolate(image(x, grid), size=c.reduced_grid, mode="bilinear"))
    return x


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)
