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
from mllm_jax.interop.honeybee_fields import DROPOUT, OPTIONS, SUPPORTED, connector_of
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


# The projector's part of `configs/model_config/*.yaml`, with what the config class adds.
PROJECTORS = {
    "c-abs": {
        "depth": 3, "mlp_depth": 2, "hidden_size": 1024, "num_eos_tokens": 0, "pos_emb": True,
        "feature_layer_index": -1, "prenorm": False, "num_query_tokens": 144,
    },
    "resampler": {
        "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "intermediate_size": 4096,
        "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-6, "pos_emb": False,
        "feature_layer_index": -1, "num_eos_tokens": 0, "num_query_tokens": 64,
    },
    "d-abs": {
        "d_model": 1024, "decoder_layers": 6, "use_pretrained_backbone": False, "num_eos_tokens": 0,
        "initializer_range": 0.02, "disable_custom_kernels": False, "num_feature_levels": 1,
        "feature_layer_index": -1, "pos_emb": True, "manual_init_refPoints": True, "learnable_mRP": True,
        "pooled_v_target": "query", "dropout": 0.1, "num_queries": 144, "num_query_tokens": 144,
    },
}  # fmt: skip


def read(kind, change=None, first=False, whole=None):
    """The options of a projector with some entries changed; `first`: as the first release writes it."""
    inside = {"encoder_hidden_size": 1024, "output_hidden_size": 4096}
    projector = {"projector_type": kind, **PROJECTORS[kind], **inside, **(change or {})}
    projector = {key: value for key, value in projector.items() if value != "nothing"}
    fields = {"visual_projector_config" if first else "projector_config": projector, **(whole or {})}
    name, options, layer = connector_of(fields, "config.json", 1024, 4096)
    return name, options | {"select_layer": layer}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_what_configs_of_honeybee_say(kind):
    expected = {
        "c-abs": ("c_abstractor", {"depth": 3, "mlp_depth": 2, "hidden": 1024, "tokens": 144, "prenorm": False}),
        "resampler": ("resampler", {"depth": 6, "heads": 16, "mlp": 4096, "hidden": 1024, "tokens": 64}),
        "d-abs": (
            "d_abstractor",
            {"hidden": 1024, "depth": 6, "heads": 8, "points": 4, "mlp": 1024, "tokens": 144, "pooled": "query"},
        ),
    }[kind]  # fmt: skip
    name, options = read(kind)
    assert name == expected[0]
    assert expected[1].items() <= options.items()
    assert (options["end_tokens"], options["select_layer"]) == (0, -1)
    assert options["position_table"] is (kind != "resampler")
    if kind != "resampler":
        assert read(kind, {"num_eos_tokens": "nothing"}, first=True)[1]["end_tokens"] == 1
        assert read(kind, {"num_eos_tokens": "nothing"})[1]["end_tokens"] == 0


@pytest.mark.parametrize("kind", ["c-abs", "d-abs"])
def test_every_entry_of_a_whole_config_is_known(kind):
    """As `to_dict` of the config classes writes them, hundreds of entries with their defaults."""
    transformers = pytest.importorskip("transformers")
    written = transformers.PretrainedConfig().to_dict()
    if kind == "d-abs":
        written |= transformers.DeformableDetrConfig().to_dict()
        written.pop("num_queries")
    assert read(kind, {**written, **PROJECTORS[kind]}) == read(kind)


def changes():
    """(kind, entry, another value): each must change an option, or be refused by its name."""
    for kind, projector in PROJECTORS.items():
        for key in {**projector, **SUPPORTED[kind], **OPTIONS[kind], **dict.fromkeys([DROPOUT.get(kind)])}:
            if key in (None, "initializer_range", "use_pretrained_backbone", "disable_custom_kernels"):
                continue  # how training began, and which code computes the same
            before = projector.get(key, SUPPORTED[kind].get(key, (2,))[-1])
            other = (
                not before if isinstance(before, bool) else "tgt" if isinstance(before, str) else before + 0.5
            )
            yield (
                kind,
                key,
                int(other + 0.5) if isinstance(before, int) and other is not bool(other) else other,
            )
        yield from ((kind, key, 5) for key in ("encoder_hidden_size", "output_hidden_size", "of_tomorrow"))
        yield from ((kind, "of_tomorrow", value) for value in (0, 0.0))  # not "off", as False is


@pytest.mark.parametrize(("kind", "key", "value"), list(changes()))
def test_no_entry_of_the_projector_is_ignored(kind, key, value):
    try:
        changed = read(kind, {key: value})
    except ValueError as error:
        assert key in str(error)  # noqa: PT017
        return
    assert changed != read(kind), f"{key}={value!r} changes nothing"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("c-abs", {"depth": "nothing"}, "the projector's depth is missing"),
        ("c-abs", {"depth": "3"}, "depth='3' must be int"),
        ("c-abs", {"depth": True}, "depth=True must be int"),
        ("c-abs", {"prenorm": 1}, "prenorm=1 must be bool"),
        ("c-abs", {"depth": -1}, "depth=-1 must not be negative"),
        ("c-abs", {"mlp_depth": 10**9}, "mlp_depth: 1,000,000,000 layers of a model, more than 1,024"),
        ("c-abs", {"projector_type": ["c-abs"]}, r"projector_type=\['c-abs'\]; supported"),
        ("d-abs", {"pooled_v_target": {}}, "pooled_v_target={}; supported"),
        ("c-abs", {"num_query_tokens": "nothing"}, "num_query_tokens is missing"),
        ("c-abs", {"num_query_tokens": 0}, "num_query_tokens=0 must be a positive whole number"),
        ("d-abs", {"num_queries": 300}, "num_query_tokens=144, num_queries=300 must be the same number"),
        ("d-abs", {"pooled_v_target": "key"}, "pooled_v_target='key'; supported: query, tgt, none"),
        ("d-abs", {"except_cls": False}, "except_cls=False is not supported"),
        ("d-abs", {"num_feature_levels": 3}, "num_feature_levels=3 is not supported"),
        ("d-abs", {"feature_layer_index": [-1, -6]}, r"feature_layer_index=\[-1, -6\]; features of one layer"),
        ("d-abs", {"dropout": "some"}, "dropout='some' must be a rate"),
        ("resampler", {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 is not supported; supported: 1e-06"),
        ("resampler", {"pruned_heads": {"0": [1]}}, "pruned_heads=.* is not supported"),
        ("c-abs", {"projector_type": "mlp"}, "projector_type='mlp'; supported: c-abs, resampler, d-abs"),
        ("c-abs", {"encoder_hidden_size": 768}, "encoder_hidden_size=768, but its neighbour has 1024"),
    ],
)  # fmt: skip
def test_projectors_that_are_refused(kind, change, message):
    with pytest.raises(ValueError, match=message):
        read(kind, change)


def test_what_the_first_release_did_not_have():
    with pytest.raises(ValueError, match="the first release has no resampler"):
        read("resampler", first=True)
    with pytest.raises(
        ValueError, match="num_query_tokens=144, the model's num_query_tokens=64 must be the same"
    ):
        read("c-abs", first=True, whole={"num_query_tokens": 64})
    moved = read("c-abs", {"num_query_tokens": "nothing"}, first=True, whole={"num_query_tokens": 144})
    assert moved == read("c-abs")


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_more_or_less_is_named(name, tmp_path):
    config, names = CASES[name]
    names = {f"abstractor.{key}": shape for key, shape in names.items()}
    write(tmp_path / "more", {**names, "abstractor.level_emb": (1, 2, 1, 8)})
    write(tmp_path / "less", dict(list(names.items())[:-1]))
    part = connector_part(config, "honeybee")
    with pytest.raises(ValueError, match=r"no parameter takes tensor 'abstractor\.level_emb'"):
        plan_parts(Source(tmp_path / "more"), [part])
    with pytest.raises(ValueError, match=f"holds no tensor '{list(names)[-1].removeprefix('abstractor.')}'"):
        plan_parts(Source(tmp_path / "less"), [part])
    table = {"d_abstractor": "v_pos_emb", "c_abstractor": "pos_emb"}.get(name)
    if table:
        shape = names[f"abstractor.{table}"]
        write(tmp_path / "row", {**names, f"abstractor.{table}": (1, shape[1] + 1, shape[2])})
        if name == "c_abstractor":
            _, _, report = plan_parts(Source(tmp_path / "row"), [part])
            assert report.ignored == {
                "abstractor.pos_emb (in part)": "its first row is a class token's, which is no patch"
            }
        else:  # where the class token would be a patch
            with pytest.raises(ValueError, match="v_pos_emb"):
                plan_parts(Source(tmp_path / "row"), [part])


def test_another_encoder_and_its_normalisation(tmp_path):
    honeybee_checkpoint(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["vision_config"] |= {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert read_composite(tmp_path).model.vision.mean == (0.5, 0.25, 0.75)
    fields["vision_config"]["encoder_type"] = "eva"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="encoder_type='eva' is not supported"):
        read_composite(tmp_path)
