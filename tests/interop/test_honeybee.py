"""Honeybee's abstractors: every tensor name of the originals has its place; C-Abstractor against timm itself."""

import json

import jax
import numpy as np
import pytest
from parity_cases import random_tensor
from safetensors.numpy import save_file

from mllm_jax.connectors.base import VisionFeatures
from mllm_jax.interop import families
from mllm_jax.interop.assemble import read_tree
from mllm_jax.interop.checkpoints import load_model
from mllm_jax.interop.composite import read_composite
from mllm_jax.interop.connector_names import connector_part
from mllm_jax.interop.parts import llm_shapes, plan_parts, vision_shapes
from mllm_jax.interop.source import Source
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

VISION = VisionConfig(width=12, depth=2, heads=2, mlp_width=16, patch=4, image_size=16)
LLM = DecoderConfig(vocab=11, width=10, depth=1, heads=2, kv_heads=2, head_width=4, mlp_width=8)


def model(connector, **options):
    """A model with this connector on a 4x4 grid."""
    return ModelConfig(
        VISION,
        LLM,
        16,
        select_layer=-1,
        connector=connector,
        connector_options=tuple(sorted(options.items())),
    )


def norm_names(name, width):
    """LayerNorm tensors."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear_names(name, inside, outside):
    """Linear tensors."""
    return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}


def resampler_names(width, hidden, out, mlp, layers, queries):
    """State dict of honeybee/projectors/resamplers.py, from its module attributes."""
    names = {"query_tokens": (1, queries, hidden)}
    names |= linear_names("visual_input_fc", width, hidden) | linear_names("visual_output_fc", hidden, out)
    for i in range(layers):
        layer = f"encoder.layers.{i}.crossattention"
        for part in ("query", "key", "value"):
            names |= linear_names(f"{layer}.attention.{part}", hidden, hidden)
        names |= norm_names(f"{layer}.norm1", hidden) | norm_names(f"{layer}.normk", hidden)
        names |= linear_names(f"{layer}.output.out_proj", hidden, hidden)
        names |= norm_names(f"{layer}.output.norm2", hidden)
        names |= linear_names(f"{layer}.output.mlp.w1", hidden, mlp)
        names |= linear_names(f"{layer}.output.mlp.w3", hidden, mlp)
        names |= linear_names(f"{layer}.output.mlp.w2", mlp, hidden)
        names |= norm_names(f"{layer}.output.mlp.ffn_ln", mlp)
    return names


def d_abstractor_names(width, hidden, out, mlp, layers, queries, heads, points, patches):
    """State dict of honeybee/projectors/dabs.py: Deformable DETR's decoder layers and its own tensors."""
    names = {
        "query_position_embeddings.weight": (queries, hidden),
        "reference_points": (1, queries, 2),
        "v_pos_emb": (1, patches, hidden),
    }
    names |= linear_names("input_proj.0", width, hidden) | linear_names("output_proj", hidden, out)
    for i in range(layers):
        layer = f"layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names |= linear_names(f"{layer}.self_attn.{part}", hidden, hidden)
        names |= norm_names(f"{layer}.self_attn_layer_norm", hidden)
        names |= linear_names(f"{layer}.encoder_attn.sampling_offsets", hidden, heads * points * 2)
        names |= linear_names(f"{layer}.encoder_attn.attention_weights", hidden, heads * points)
        for part in ("value_proj", "output_proj"):
            names |= linear_names(f"{layer}.encoder_attn.{part}", hidden, hidden)
        names |= norm_names(f"{layer}.encoder_attn_layer_norm", hidden)
        names |= linear_names(f"{layer}.fc1", hidden, mlp) | linear_names(f"{layer}.fc2", mlp, hidden)
        names |= norm_names(f"{layer}.final_layer_norm", hidden)
    return names


def c_abstractor_names(width, hidden, out, depth, patches, end_tokens):
    """State dict of honeybee/projectors/projectors.py: timm's RegStages `net.0`, `net.2`, and the readout."""
    names = {"pos_emb": (1, patches, width), "eos_tokens": (1, end_tokens, out)}
    for stage, first in ((0, width), (2, hidden)):
        for i in range(depth):
            inside = first if i == 0 else hidden
            block = f"net.{stage}.b{i + 1}"
            squeeze = round(0.25 * inside)
            for conv, shape in (
                ("conv1", (hidden, inside, 1, 1)),
                ("conv2", (hidden, 1, 3, 3)),
                ("conv3", (hidden, hidden, 1, 1)),
            ):
                names[f"{block}.{conv}.conv.weight"] = shape
                names |= norm_names(f"{block}.{conv}.bn", hidden)
            names |= {f"{block}.se.fc1.weight": (squeeze, hidden, 1, 1), f"{block}.se.fc1.bias": (squeeze,)}
            names |= {f"{block}.se.fc2.weight": (hidden, squeeze, 1, 1), f"{block}.se.fc2.bias": (hidden,)}
            if inside != hidden:
                names[f"{block}.downsample.conv.weight"] = (hidden, inside, 1, 1)
                names |= norm_names(f"{block}.downsample.bn", hidden)
    return names | linear_names("readout.0", hidden, out) | linear_names("readout.2", out, out)


CASES = {
    "resampler": (
        model("resampler", tokens=3, hidden=8, depth=2, heads=2, mlp=6),
        resampler_names(12, 8, 10, 6, 2, 3),
    ),
    "d_abstractor": (
        model("d_abstractor", tokens=4, hidden=8, depth=2, heads=2, points=3, mlp=6),
        d_abstractor_names(12, 8, 10, 6, 2, 4, 2, 3, 16),
    ),
    "c_abstractor": (
        model("c_abstractor", tokens=4, hidden=8, depth=2, end_tokens=1),
        c_abstractor_names(12, 8, 10, 2, 16, 1),
    ),
}


def write(directory, names):
    """A checkpoint of random tensors."""
    directory.mkdir(exist_ok=True)
    tensors = {name: random_tensor(name, shape) for name, shape in names.items()}
    save_file(tensors, directory / "model.safetensors")
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_every_name_has_its_place(name, tmp_path):
    config, names = CASES[name]
    tensors = write(tmp_path, {f"abstractor.{key}": shape for key, shape in names.items()})
    source = Source(tmp_path)
    placements, shapes, report = plan_parts(source, [connector_part(config, "honeybee")])
    assert set(report.used) == set(tensors)
    assert not report.ignored
    params = read_tree(source, placements, shapes)["connector"]
    for placement in placements:
        written = placement.rule.transform.write(_leaf(params, placement.path.removeprefix("connector/")))
        np.testing.assert_array_equal(written, tensors[placement.name])


def _leaf(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def honeybee_checkpoint(directory):
    """A whole checkpoint in Honeybee's layout with a C-Abstractor; returns its tensors."""
    transformers = pytest.importorskip("transformers")

    names = {f"abstractor.{key}": shape for key, shape in CASES["c_abstractor"][1].items()}
    for family, part, prefix in (
        (families.VISION["clip_vision_model"], VISION, "vision_model.vision_model."),
        (families.LLMS["llama"], LLM, "language_model."),
    ):
        shapes = vision_shapes(part) if prefix.startswith("vision") else llm_shapes(part)
        for rule in family.rules(part):
            for i in range(part.depth) if rule.stacked else (0,):
                shape = shapes[rule.path][1:] if rule.stacked else shapes[rule.path]
                shape = rule.transform.write(np.broadcast_to(np.int8(0), shape)).shape
                names[prefix + rule.name.replace("{i}", str(i))] = shape
    tensors = write(directory, names)
    fields = {
        "model_type": "mllm",
        "num_query_tokens": 4,
        "vision_config": transformers.CLIPVisionConfig(
            **{
                **families.VISION["clip_vision_model"].write(VISION),
                "model_type": "clip_vision_model",
            }
        ).to_dict(),
        "text_config": families.LLMS["llama"].write(LLM),
        "visual_projector_config": {
            "projector_type": "c-abs",
            "depth": 2,
            "mlp_depth": 2,
            "hidden_size": 8,
            "num_eos_tokens": 1,
            "pos_emb": True,
            "feature_layer_index": -1,
            "prenorm": False,
            "num_query_tokens": 4,
        },
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return tensors


def test_a_whole_honeybee_checkpoint(tmp_path):
    names = honeybee_checkpoint(tmp_path)
    composite = read_composite(tmp_path)
    assert composite.model.connector == "c_abstractor"
    assert composite.model.visual_layout.slot.num_tokens == 5
    _, params, report = load_model(tmp_path)
    assert len(report.used) == len(names)
    assert params["connector"]["end_tokens"].shape == (1, 10)


def test_both_ages_of_checkpoints(tmp_path):
    """First: model_type "mllm" and a row for the class token. Later: neither, and other keys."""
    tensors = honeybee_checkpoint(tmp_path / "a")
    expected_model, expected, _ = load_model(tmp_path / "a")
    table = tensors["abstractor.pos_emb"]
    tensors["abstractor.pos_emb"] = np.concatenate([np.full_like(table[:, :1], 9), table], axis=1)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    _, params, _ = load_model(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    fields["projector_config"] = fields.pop("visual_projector_config")
    fields["projector_config"]["num_query_tokens"] = fields.pop("num_query_tokens")
    fields |= {"model_type": "", "lm_config": {"model_type": "", "pretrained_lm_name_or_path": "somewhere"}}
    fields["vision_config"] |= {"model_type": "", "encoder_type": "openai.clip"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(fields))
    model, params, _ = load_model(tmp_path / "a")
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, params, expected)

    tensors["abstractor.pos_emb"] = np.concatenate([tensors["abstractor.pos_emb"], table[:, :1]], axis=1)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=r"'connector/position_table' needs shape \(16, 12\)"):
        load_model(tmp_path / "a")
    fields["projector_config"]["feature_layer_index"] = [-1, -2]
    (tmp_path / "a" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"feature_layer_index=\[-1, -2\]; features of one layer"):
        load_model(tmp_path / "a")


def test_c_abstractor_computes_what_timm_does(tmp_path):
    torch = pytest.importorskip("torch")
    regnet = pytest.importorskip("timm.models.regnet")
    from timm.layers import LayerNorm2d

    config, names = CASES["c_abstractor"]

    class Original(torch.nn.Module):
        """Honeybee's C-Abstractor, from its description."""

        def __init__(self):
            super().__init__()
            options = {"stride": 1, "dilation": 1, "act_layer": torch.nn.SiLU, "norm_layer": LayerNorm2d}
            first, second = regnet.RegStage(2, 12, 8, **options), regnet.RegStage(2, 8, 8, **options)
            self.net = torch.nn.Sequential(first, torch.nn.AdaptiveAvgPool2d((2, 2)), second)
            self.readout = torch.nn.Sequential(
                torch.nn.Linear(8, 10), torch.nn.SiLU(), torch.nn.Linear(10, 10)
            )
            self.pos_emb = torch.nn.Parameter(torch.zeros(1, 16, 12))
            self.eos_tokens = torch.nn.Parameter(torch.zeros(1, 1, 10))

        def forward(self, x):
            x = (x + self.pos_emb).transpose(1, 2).reshape(-1, 12, 4, 4)
            x = self.readout(self.net(x).flatten(2).transpose(1, 2))
            return torch.cat([x, self.eos_tokens.expand(len(x), -1, -1)], dim=1)

    original = Original().eval()
    assert {key: tuple(value.shape) for key, value in original.state_dict().items()} == names
    tensors = write(tmp_path, {f"abstractor.{key}": shape for key, shape in names.items()})
    original.load_state_dict(
        {key.removeprefix("abstractor."): torch.tensor(value) for key, value in tensors.items()}
    )
    source = Source(tmp_path)
    placements, shapes, _ = plan_parts(source, [connector_part(config, "honeybee")])
    params = read_tree(source, placements, shapes)["connector"]
    features = random_tensor("features", (2, 16, 12))
    connector = config.make_connector()
    layer = config.vision_spec.select_layer
    ours = jax.jit(lambda p, x: connector.apply({"params": p}, VisionFeatures({layer: x}, grid=(4, 4))))(
        params, features
    )
    with torch.no_grad():
        expected = original(torch.tensor(features))
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)
