"""q_former: the definition in torch, and transformers' own BLIP-2 Q-Former with the same weights."""

import numpy as np
import pytest
from connector_testing import TOLERANCE, Case, on_grids, parameters, run

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import attention, check, linear, mlp, norm  # noqa: E402

SMALL = {"tokens": 9, "hidden": 12, "depth": 4, "heads": 3, "mlp": 20}
CASES = [
    Case("q_former", SMALL),
    Case("q_former", SMALL | {"cross_every": 3, "variant": "next"}),
    Case("q_former", SMALL | {"cross_every": 1, "variant": "next", "layers": 1}, llm=16),
]


def oracle(c, p, states, grid):
    patches = states[c.vision.select_layer]
    x = p["queries"].expand(len(patches), -1, -1)
    if c.variant == "next":
        patches = norm(patches, p["patch_norm"])
        x = norm(x, p["query_norm"], 1e-12)
    else:
        x = norm(x, None, 1e-12)
    for i in range(c.depth):
        b = p[f"block_{i}"]
        for kind, keys in (("self", None), ("cross", patches)):
            if kind == "cross" and i % c.cross_every:
                continue
            keys = x if keys is None else keys
            q, k, v = linear(x, b[f"{kind}_q"]), linear(keys, b[f"{kind}_k"]), linear(keys, b[f"{kind}_v"])
            x = norm(x + linear(attention(q, k, v, c.heads), b[f"{kind}_out"]), b[f"{kind}_norm"], 1e-12)
        x = norm(x + linear(F.gelu(linear(x, b["fc1"])), b["fc2"]), b["mlp_norm"], 1e-12)
    return mlp(x, p, c.layers if c.variant == "next" else 1)


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


def test_equals_blip2_of_transformers():
    """Variant "next" has BLIP-2's stack; patch norm and projector are put around transformers' module."""
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    case, grid = CASES[1], (12, 20)
    connector = case.create(grid)
    p = parameters(connector, grid)
    model = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=12,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=20,
            encoder_hidden_size=case.width,
            cross_attention_frequency=3,
            layer_norm_eps=1e-12,
            attn_implementation="eager",
        )
    ).eval()
    ours = {"layernorm": p["query_norm"]}
    for i in range(4):
        b, layer = p[f"block_{i}"], f"encoder.layer.{i}"
        for kind, theirs in (("self", "attention"), ("cross", "crossattention")):
            if f"{kind}_q" in b:
                names = {"q": "attention.query", "k": "attention.key", "v": "attention.value"}
                names |= {"out": "output.dense", "norm": "output.LayerNorm"}
                ours |= {f"{layer}.{theirs}.{to}": b[f"{kind}_{ours_}"] for ours_, to in names.items()}
        ours[f"{layer}.intermediate_query.dense"] = b["fc1"]
        ours[f"{layer}.output_query.dense"] = b["fc2"]
        ours[f"{layer}.output_query.LayerNorm"] = b["mlp_norm"]
    state = {}
    for name, leaf in ours.items():
        state[f"{name}.weight"] = torch.from_numpy(leaf["kernel"].T if "kernel" in leaf else leaf["scale"])
        state[f"{name}.bias"] = torch.from_numpy(leaf["bias"])
    own_text_half = {n for n in model.state_dict() if ".intermediate." in n or ".output.dense" in n}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= own_text_half  # only the text branch, which queries alone never enter

    with torch.no_grad():
        states = case.states(grid)
        patches = torch.from_numpy(states[case.select])
        tensors = {k: torch.from_numpy(v) for k, v in p["patch_norm"].items()}
        queries = torch.from_numpy(p["queries"]).expand(2, -1, -1)
        out = model(query_embeds=queries, encoder_hidden_states=norm(patches, tensors)).last_hidden_state
        projector = {k: {n: torch.from_numpy(a) for n, a in p[k].items()} for k in ("layer_0", "layer_1")}
        theirs = mlp(out, projector).numpy()
    np.testing.assert_allclose(run(connector, p, states, grid), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "blip"}, "valid: 'tlf', 'next'"),
        ({"heads": 7}, "q_former.heads=7 does not divide q_former.hidden=768"),
        ({"tokens": 0}, "'tokens' of connector 'q_former' must be at least 1"),
        ({"cross_every": 0}, "must be at least 1"),
    ],
)
def test_impossible_options_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        Case("q_former", options).create((24, 24))
