"""d_abstractor: grid_sample in torch, and transformers' own Deformable DETR layer with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from connector_testing import TOLERANCE, Case, on_grids, parameters

from mllm_jax import connectors
from mllm_jax.connectors.d_abstractor import reference_grid
from mllm_jax.connectors.deformable import DeformableLayer, ring

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from connector_torch import attention, check, image, linear, norm, tokens  # noqa: E402

SMALL = {"tokens": 16, "hidden": 16, "depth": 2, "heads": 4, "points": 3, "mlp": 20}
CASES = [
    Case("d_abstractor", SMALL),
    Case("d_abstractor", SMALL | {"pooled": "target", "end_tokens": 2}, width=16, llm=16),
    Case("d_abstractor", SMALL | {"pooled": "none", "position_table": False}),
]


def deformable(queries, patches, references, b, grid, heads, points):
    batch, count, width = queries.shape
    value = image(linear(patches, b["value"]), grid).reshape(batch * heads, width // heads, *grid)
    offsets = linear(queries, b["offsets"]).reshape(batch, count, heads, points, 2)
    weights = linear(queries, b["weights"]).reshape(batch, count, heads, points).softmax(-1)
    where = references[None, :, None, None] + offsets / torch.tensor([grid[1], grid[0]])
    where = (2 * where - 1).transpose(1, 2).reshape(batch * heads, count, points, 2)
    sampled = F.grid_sample(value, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, count, points)
    out = (sampled * weights).sum(-1).reshape(batch, width, count).transpose(1, 2)
    return linear(out, b["out"])


def oracle(c, p, states, grid):
    patches = states[c.vision.select_layer]
    if patches.shape[-1] != c.hidden:
        patches = linear(patches, p["input"])
    if c.position_table:
        patches = patches + p["position_table"]
    learned = p["queries"].expand(len(patches), -1, -1)
    side = round(c.tokens**0.5)
    pooled = tokens(F.adaptive_avg_pool2d(image(patches, grid), (side, side)))
    positions, x = {
        "query": lambda: (pooled, learned),
        "target": lambda: (learned, pooled),
        "none": lambda: learned.split(c.hidden, dim=-1),
    }[c.pooled]()
    for i in range(c.depth):
        b = p[f"block_{i}"]
        q, k, v = (
            linear(a, b[f"self_{n}"]) for a, n in ((x + positions, "q"), (x + positions, "k"), (x, "v"))
        )
        x = norm(x + linear(attention(q, k, v, c.heads), b["self_out"]), b["self_norm"])
        y = deformable(x + positions, patches, p["references"], b, grid, c.heads, c.points)
        x = norm(x + y, b["cross_norm"])
        x = norm(x + linear(F.relu(linear(x, b["fc1"])), b["fc2"]), b["mlp_norm"])
    if c.end_tokens:
        x = torch.cat([x, p["end_tokens"].expand(len(x), -1, -1)], dim=1)
    return linear(x, p["output"]) if "output" in p else x


@pytest.mark.parametrize(("case", "grid"), on_grids(CASES))
def test_parity(case, grid):
    check(case, oracle, grid)


def test_layer_equals_deformable_detr_of_transformers():
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer

    grid, heads, points, width = (12, 20), 4, 3, 16
    connector = CASES[0].create(grid)
    b, references = parameters(connector, grid)["block_0"], parameters(connector, grid)["references"]
    config = DeformableDetrConfig(
        backbone_config={"model_type": "resnet"},
        use_timm_backbone=False,
        d_model=width,
        decoder_attention_heads=heads,
        decoder_n_points=points,
        decoder_ffn_dim=20,
        num_feature_levels=1,
        attn_implementation="eager",
    )
    layer = DeformableDetrDecoderLayer(config).eval()
    names = {f"self_attn.{n}_proj": f"self_{n}" for n in ("q", "k", "v")}
    names |= {"self_attn.o_proj": "self_out", "self_attn_layer_norm": "self_norm"}
    names |= {"encoder_attn.sampling_offsets": "offsets", "encoder_attn.attention_weights": "weights"}
    names |= {"encoder_attn.value_proj": "value", "encoder_attn.output_proj": "out"}
    names |= {"encoder_attn_layer_norm": "cross_norm", "final_layer_norm": "mlp_norm"}
    names |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    state = {}
    for theirs, ours in names.items():
        leaf = b[ours]
        state[f"{theirs}.weight"] = torch.from_numpy(leaf["kernel"].T if "kernel" in leaf else leaf["scale"])
        state[f"{theirs}.bias"] = torch.from_numpy(leaf["bias"])
    layer.load_state_dict(state, strict=True)

    rng = np.random.RandomState(0)
    x, positions = (rng.randn(2, 16, width).astype(np.float32) for _ in range(2))
    patches = rng.randn(2, grid[0] * grid[1], width).astype(np.float32)
    with torch.no_grad():
        theirs = layer(
            torch.from_numpy(x),
            object_queries_position_embeddings=torch.from_numpy(positions),
            reference_points=torch.from_numpy(references)[None, :, None].expand(2, -1, -1, -1),
            spatial_shapes=torch.tensor([grid]),
            spatial_shapes_list=[grid],
            level_start_index=torch.tensor([0]),
            encoder_hidden_states=torch.from_numpy(patches),
        )
    ours = DeformableLayer(heads, points, 20, 0.1, False, jnp.float32, jnp.float32).apply(
        {"params": b}, *(jnp.asarray(a) for a in (x, positions, patches, references)), grid, True
    )
    np.testing.assert_allclose(
        ours, theirs[0] if isinstance(theirs, tuple) else theirs, rtol=0, atol=TOLERANCE
    )


def test_initial_reference_points_span_the_patch_centres():
    points = reference_grid(12, (24, 16))
    np.testing.assert_allclose(points[0], [0.5 / 16, 0.5 / 24])
    np.testing.assert_allclose(points[11], [15.5 / 16, 0.5 / 24], rtol=1e-6)
    np.testing.assert_allclose(points[12], [0.5 / 16, (0.5 + 23 / 11) / 24], rtol=1e-6)
    np.testing.assert_allclose(points[-1], [15.5 / 16, 23.5 / 24], rtol=1e-6)


def test_ring_offsets_start_as_in_deformable_detr():
    np.testing.assert_allclose(ring(8, 4)[0], [[1, 0], [2, 0], [3, 0], [4, 0]])
    np.testing.assert_allclose(ring(8, 4)[1], [[1, 1], [2, 2], [3, 3], [4, 4]], rtol=1e-6)
    case, grid = Case("d_abstractor", SMALL | {"ring_offsets": True}), (12, 20)
    connector = case.create(grid)
    features = connectors.collect(connector.request(), [jnp.asarray(s) for s in case.states(grid)], grid)
    params = connector.init(jax.random.key(0), features)["params"]["block_1"]
    np.testing.assert_allclose(params["offsets"]["bias"], ring(4, 3).reshape(-1))
    assert not np.any(params["offsets"]["kernel"])
    assert not np.any(params["weights"]["kernel"])
    near = case.options | {"ring_offsets": False}
    start = Case("d_abstractor", near).create(grid).init(jax.random.key(0), features)["params"]["block_1"]
    assert not np.any(start["offsets"]["bias"])
    assert 0.01 < np.std(start["offsets"]["kernel"]) < 0.03


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"tokens": 150}, (24, 24), "d_abstractor.tokens=150 is not a perfect square"),
        ({}, (8, 24), "cannot be pooled from a 8x24"),
        ({"pooled": "keys"}, (24, 24), "valid: 'query', 'target', 'none'"),
        ({"heads": 6}, (24, 24), "d_abstractor.heads=6 does not divide d_abstractor.hidden=1024"),
    ],
)
def test_impossible_options_say_so(options, grid, message):
    with pytest.raises(ValueError, match=message):
        Case("d_abstractor", options).create(grid)


def test_position_table_is_for_one_grid():
    with pytest.raises(ValueError, match="does not fit 16x16"):
        Case("d_abstractor").create((24, 24)).num_tokens((16, 16))
