"""pixel_shuffle: torch's pixel_unshuffle, and transformers' InternVL and Idefics3 with the same weights."""

import numpy as np
import pytest
from connector_testing import TOLERANCE, Case, on_grids, parameters, run

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import check, image, linear, mlp, norm  # noqa: E402

CASES = [
    Case("pixel_shuffle"),
    Case("pixel_shuffle", {"factor": 4}),
    Case("pixel_shuffle", {"variant": "idefics3"}),
    Case("pixel_shuffle", {"variant": "idefics3", "factor": 3}),
]


def oracle(c, p, states, grid):
    x = image(states[c.vision.select_layer], grid)
    x = F.pixel_unshuffle(x, c.factor)  # channels ordered by channel, row, column
    x = x.unflatten(1, (-1, c.factor, c.factor)).permute(0, 4, 5, 2, 3, 1).flatten(3).flatten(1, 2)
    return linear(x, p["layer_0"]) if c.variant == "idefics3" else mlp(norm(x, p["norm"]), p)


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    factor = case.options.get("factor", 2)
    if grid[0] % factor or grid[1] % factor:
        with pytest.raises(
            ValueError, match=rf"pixel_shuffle.factor={factor} does not divide the {grid[0]}x"
        ):
            case.create(grid)
        return
    check(case, oracle, grid)


def test_equals_idefics3_of_transformers():
    from types import SimpleNamespace

    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    case, grid = CASES[2], (16, 16)
    connector = case.create(grid)
    p, states = parameters(connector, grid), case.states(grid)
    config = SimpleNamespace(
        scale_factor=2,
        vision_config=SimpleNamespace(hidden_size=case.width),
        text_config=SimpleNamespace(hidden_size=case.llm),
    )
    theirs = Idefics3Connector(config)
    theirs.load_state_dict({"modality_projection.proj.weight": torch.from_numpy(p["layer_0"]["kernel"].T)})
    with torch.no_grad():
        out = theirs(torch.from_numpy(states[case.select])).numpy()
    np.testing.assert_allclose(run(connector, p, states, grid), out, rtol=0, atol=TOLERANCE)


def test_equals_internvl_of_transformers():
    from types import SimpleNamespace

    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    case, grid = CASES[0], (16, 16)
    connector = case.create(grid)
    p, states = parameters(connector, grid), case.states(grid)
    config = SimpleNamespace(
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
        vision_config=SimpleNamespace(hidden_size=case.width),
        text_config=SimpleNamespace(hidden_size=case.llm),
    )
    theirs = InternVLMultiModalProjector(config)
    names = {"layer_norm": "norm", "linear_1": "layer_0", "linear_2": "layer_1"}
    state = {}
    for to, ours in names.items():
        leaf = p[ours]
        state[f"{to}.weight"] = torch.from_numpy(leaf["kernel"].T if "kernel" in leaf else leaf["scale"])
        state[f"{to}.bias"] = torch.from_numpy(leaf["bias"])
    theirs.load_state_dict(state)
    with torch.no_grad():
        x = torch.from_numpy(states[case.select]).reshape(2, 16, 16, case.width)
        shuffled = InternVLModel.pixel_shuffle(None, x, scale_factor=0.5)
        out = theirs(shuffled.reshape(2, 64, -1)).numpy()
    np.testing.assert_allclose(run(connector, p, states, grid), out, rtol=0, atol=TOLERANCE)


def test_unknown_variant_says_so():
    with pytest.raises(ValueError, match="valid: 'internvl', 'idefics3'"):
        Case("pixel_shuffle", {"variant": "pixel"}).create((24, 24))
