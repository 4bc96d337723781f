"""TokenPacker's names, whose attention keeps queries, keys and values in one tensor."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from mllm_jax import connectors
from mllm_jax.interop import families
from mllm_jax.interop.assemble import plan, write_plan
from mllm_jax.interop.checkpoints import load_connector, load_model, save_connector
from mllm_jax.interop.composite import read_composite
from mllm_jax.interop.llava_layout import config_fields, save_llava
from mllm_jax.interop.rules import attention_inputs
from mllm_jax.interop.source import Source
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

LLM = DecoderConfig(vocab=29, width=6, depth=1, heads=1, kv_heads=1, head_width=6, mlp_width=12)
WIDTH, HIDDEN, HEADS = 12, 8, 2
PREFIX = "model.mm_projector."


def model(depth=4, image_size=16, **options):
    vision = VisionConfig(width=WIDTH, depth=depth, heads=2, mlp_width=10, patch=4, image_size=image_size)
    options = tuple(sorted(options.items()))
    return ModelConfig(vision, LLM, image_size, connector="token_packer", connector_options=options)


@pytest.fixture(scope="module")
def small():
    config = model(hidden=HIDDEN, heads=HEADS, layers=(1, 2))
    return config, tiny.random_params(mllm.abstract_params(config)["connector"])


def test_published_module(small, tmp_path):
    """A module with the published one's names: the same visual tokens from its tensors, and its tensors back."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    config, _ = small
    torch.manual_seed(0)
    module = nn.Module()
    module.q_proj_1 = nn.Linear(WIDTH, HIDDEN, bias=False)
    for letter in "kv":
        expand = nn.Sequential(nn.Linear(2 * WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        module.add_module(f"{letter}_proj_1", expand)
    for letter in "qkv":
        module.add_module(f"ln_{letter}_1", nn.LayerNorm(HIDDEN, eps=1e-6))
    module.clip_attn = nn.MultiheadAttention(HIDDEN, HEADS)
    module.mlp = nn.Sequential(nn.Linear(HIDDEN, 6), nn.GELU(), nn.Linear(6, 6))
    for value in module.state_dict().values():
        value.add_(0.3 * torch.randn_like(value))  # biases, which start at zero, too
    theirs = {PREFIX + name: value.numpy() for name, value in module.state_dict().items()}
    save_file(theirs, tmp_path / "mm_projector.safetensors")

    ours = load_connector(tmp_path / "mm_projector.safetensors", config)
    states = np.random.default_rng(0).standard_normal((5, 2, 16, WIDTH)).astype(np.float32)
    connector = config.make_connector()
    features = connectors.collect(connector.request(), [*map(jnp.asarray, states)], grid=(4, 4))
    found = connector.apply({"params": jax.tree.map(jnp.asarray, ours)}, features)

    given = torch.from_numpy(states)
    # Half the size, bilinearly, is the mean of the four patches of a region.
    coarse = given[config.select_layer].unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    q = module.ln_q_1(module.q_proj_1(coarse))
    details = torch.cat([given[1], given[2]], dim=-1)
    details = details.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    k = module.ln_k_1(module.k_proj_1(details))  # [image, region, patch of it, channel]
    v = module.ln_v_1(module.v_proj_1(details))
    regions = [x.flatten(0, 1).transpose(0, 1) for x in (q[:, :, None], k, v)]
    out = module.clip_attn(*regions, need_weights=False)[0][0].unflatten(0, (2, 4))
    expected = module.mlp(out).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)

    save_connector(tmp_path / "back", config, ours)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == theirs.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, theirs[name], name)


def test_what_does_not_fit_is_named(small, tmp_path):
    config, params = small
    save_connector(tmp_path / "good", config, params)
    good = load_file(tmp_path / "good" / "model.safetensors")
    weight, bias = (f"{PREFIX}clip_attn.in_proj_{each}" for each in ("weight", "bias"))
    for number, (change, said) in enumerate(
        (
            ({f"{PREFIX}q_proj_1.bias": np.zeros(HIDDEN, np.float32)}, r"q_proj_1\.bias"),
            ({bias: None}, r"clip_attn\.in_proj_bias"),
            ({weight: good[weight][:-1]}, r"clip_attn\.in_proj_weight' gives no such layout"),
            ({weight: good[weight][:-3]}, r"clip_attn\.in_proj_weight' gives \(8, 7\)"),
        )
    ):
        tensors = {name: value for name, value in (good | change).items() if value is not None}
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file)
        with pytest.raises(ValueError, match=said):
            load_connector(file, config, allow_mismatch=True)


def test_a_tensor_is_taken_and_made_as_a_whole(tmp_path):
    rows = attention_inputs(("q", "k", "v"), "attn")[:3]
    save_file({"attn.in_proj_weight": np.zeros((6, 2), np.float32)}, tmp_path / "x.safetensors")
    shapes = {"q/kernel": (2, 2), "v/kernel": (2, 2)}
    with pytest.raises(
        ValueError, match=r"in_proj_weight' holds 3 parameters, here only 'q/kernel', 'v/kernel'"
    ):
        plan(Source(tmp_path), rows, shapes, lambda name: [name])
    leaves = {name: {"kernel": np.zeros((2, 2), np.float32)} for name in "qv"}
    with pytest.raises(ValueError, match="in_proj_weight"):
        write_plan(leaves, [rows[0], rows[2]])


def test_whole_models(tmp_path):
    """config.json says a plain projector and a factor; the rest is fixed in TokenPacker's code."""
    config = model(depth=24, image_size=24, factor=3, layers=(12, 16, 22, 23))
    params = tiny.random_params(mllm.abstract_params(config))
    tower = tmp_path / "tower"
    tower.mkdir()  # the blocks that are used lie in the checkpoint
    family = families.for_config(families.VISION, config.vision)
    (tower / "config.json").write_text(json.dumps(family.write(config.vision)))
    save_llava(tmp_path / "llava", config, params, str(tower))
    file = tmp_path / "llava" / "config.json"
    fields = json.loads(file.read_text())
    assert (fields["mm_projector_type"], fields["scale_factor"]) == ("mlp2x_gelu", 3)
    assert f"{PREFIX}clip_attn.in_proj_weight" in Source(tmp_path / "llava")

    again, back, _ = load_model(tmp_path / "llava")
    assert (again.connector, again.connector_options) == (config.connector, config.connector_options)
    jax.tree.map(np.testing.assert_array_equal, back["connector"], params["connector"])
    jax.tree.map(np.testing.assert_array_equal, load_connector(tmp_path / "llava", config), back["connector"])
    other = dataclasses.replace(config, connector_options=(("factor", 2),))
    with pytest.raises(ValueError, match=r"token_packer\.factor"):
        load_connector(tmp_path / "llava", other)
    with pytest.raises(ValueError, match=r"cannot say model\.connector\.token_packer\.heads=4"):
        config_fields(dataclasses.replace(config, connector_options=(("heads", 4),)), str(tower), "pad")

    file.write_text(json.dumps({**fields, "scale_factor": None, "down_rate": 3}))
    assert read_composite(tmp_path / "llava").model.connector_options == config.connector_options
    for wrong in ({"scale_factor": "3"}, {"mm_dense_connector_type": "sci"}):
        file.write_text(json.dumps(fields | wrong))
        with pytest.raises(ValueError, match="scale_factor="):
            read_composite(tmp_path / "llava")
