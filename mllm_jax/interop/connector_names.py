"""Weight-name tables of connectors in the layouts that publish them."""

from collections.abc import Mapping

import numpy as np

from mllm_jax.interop import connector_layouts
from mllm_jax.interop.connector_layouts import (
    TOKENS,
    Shape,
    ldp_rules,
    ldpv2_rules,
    pointwise,
    token_packer_rules,
)
from mllm_jax.interop.parts import Part, Spelling
from mllm_jax.interop.rules import CONVOLUTION, Rule, Transform, linear, norm
from mllm_jax.models.mllm import ModelConfig, abstract_params
from mllm_jax.models.paths import flatten


def patch_table(count: int) -> Transform:
    """[1, N, C] <-> [N, C] of `count` patches.

    C-Abstractors of Honeybee's first release have a row for the class token too, which is dropped after the table is
    added.
    """

    def read(x: np.ndarray) -> np.ndarray:
        if x.shape[1] not in (count, count + 1):
            raise ValueError(f"a table of {x.shape[1]} positions for {count} patches")
        return x.squeeze(0)[x.shape[1] - count :]

    return Transform(read, lambda x: x[None], "its first row is a class token's, which is no patch")


# Connectors that are LLaVA's projector behind a parameter-free rearrangement of features.
PROJECTORS = (
    "linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "sti", "sci", "dci", "average_pool", "spatial_pool"
)  # fmt: skip

# Mini-Gemini's mining: its modules, each a LayerNorm (0) and a linear layer (1) -> ours.
MINING = {
    "vlm_uni_query_projector": "query",
    "vlm_uni_aux_projector": "key",
    "vlm_uni_val_projector": "value",
}

SPELLINGS: dict[str, tuple[Spelling, ...]] = {
    "llava": (
        *(
            tuple((f"{prefix}{name}.", f"{name}.") for name in ("mm_projector", "vision_resampler", *MINING))
            for prefix in ("model.", "", "base_model.model.model.")
        ),
    ),
    "llava-hf": (
        (("multi_modal_projector.", ""),),
        (("model.multi_modal_projector.", ""),),
    ),
    "honeybee": ((("abstractor.", ""),),),
    **connector_layouts.SPELLINGS,
}


def connector_shapes(config: ModelConfig) -> dict[str, Shape]:
    """{path: shape} of the connector's parameters."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config)["connector"]).items()}


def connector_part(config: ModelConfig, layout: str) -> Part:
    """The connector in a published layout.

    Raises:
      ValueError: that layout has no names for this connector.
    """
    shapes = connector_shapes(config)
    if layout in connector_layouts.TABLES:
        rules = connector_layouts.layout_rules(config, shapes, layout)
    else:
        tables = {"llava": llava_rules, "llava-hf": llava_hf_rules, "honeybee": honeybee_rules}
        rules = tables[layout](config, shapes)
    if unnamed := shapes.keys() - {rule.path for rule in rules}:
        raise ValueError(
            f"the {layout} layout has no name for connector parameter {min(unnamed)!r} of {config.connector!r}"
        )
    return Part("connector", f"a {layout} projector", rules, shapes, SPELLINGS[layout])


def separators_part(config: ModelConfig) -> Part:
    """The learned newline of images in tiles, which has one name in every layout."""
    name = "image_newline"
    prefixes = ("", "model.", "base_model.model.model.", "base_model.model.")
    return Part(
        "separators",
        "the newline of images in tiles",
        (Rule("newline", name),),
        {"newline": (config.llm.width,)},
        tuple(((prefix + name, name),) for prefix in prefixes),
    )


def _projector_only(config: ModelConfig, layout: str) -> None:
    if config.connector not in PROJECTORS:
        raise ValueError(
            f"the {layout} layout has no names for connector {config.connector!r}; it has them for "
            f"{', '.join(PROJECTORS)}. Use plain safetensors or Orbax."
        )


def llava_rules(config: ModelConfig, shapes: Mapping[str, Shape]) -> tuple[Rule, ...]:
    """LLaVA, Dense Connector, LLaVA-NeXT: `mm_projector.{0,2,...}`, or without a number for a single linear layer.

    Also MobileVLM and TokenPacker, which are laid out like LLaVA.
    """
    mining = _mining() if config.vision.mining else ()
    own = {"ldp": ldp_rules, "ldpv2": ldpv2_rules, "token_packer": token_packer_rules}
    if config.connector in own:
        return (*own[config.connector](), *mining)
    _projector_only(config, "llava")
    if config.connector == "linear":
        return (*linear("layer_0", "mm_projector"), *mining)
    count = sum(path.endswith("/kernel") and path.startswith("layer_") for path in shapes)
    rules = (
        tuple(rule for i in range(count) for rule in linear(f"layer_{i}", f"mm_projector.{2 * i}")) + mining
    )
    if "conv/bias" not in shapes or config.connector != "spatial_pool":
        return rules
    return (
        *rules,
        Rule("conv/kernel", "vision_resampler.pool.weight", CONVOLUTION),
        Rule("conv/bias", "vision_resampler.pool.bias"),
    )


def _mining() -> tuple[Rule, ...]:
    """Mini-Gemini's patch info mining."""
    rules = [
        *norm("mining/query_norm", "vlm_uni_query_projector.0"),
        *linear("mining/query", "vlm_uni_query_projector.1"),
    ]
    for name, ours in MINING.items():
        if ours != "query":  # whose norm and linear layer are parameters of one module
            rules += [
                Rule(f"mining/{ours}/norm_scale", f"{name}.0.weight"),
                Rule(f"mining/{ours}/norm_bias", f"{name}.0.bias"),
                *linear(f"mining/{ours}", f"{name}.1"),
            ]
    return tuple(rules)


def llava_hf_rules(config: ModelConfig, shapes: Mapping[str, Shape]) -> tuple[Rule, ...]:
    """transformers' LlavaMultiModalProjector: two layers with GELU between."""
    _projector_only(config, "llava-hf")
    if sum(path.endswith("/kernel") for path in shapes) != 2:
        raise ValueError(
            f"the llava-hf layout has a projector of two layers, not the one of {config.connector!r}; use plain "
            "safetensors or Orbax"
        )
    return (*linear("layer_0", "linear_1"), *linear("layer_1", "linear_2"))


def _regnet_block(path: str, name: str) -> tuple[Rule, ...]:
    """timm's RegNet Bottleneck."""
    return (
        *pointwise(f"{path}/conv1", f"{name}.conv1.conv", bias=False),
        *norm(f"{path}/norm1", f"{name}.conv1.bn"),
        Rule(f"{path}/conv2/kernel", f"{name}.conv2.conv.weight", CONVOLUTION),
        *norm(f"{path}/norm2", f"{name}.conv2.bn"),
        *pointwise(f"{path}/squeeze", f"{name}.se.fc1"),
        *pointwise(f"{path}/excite", f"{name}.se.fc2"),
        *pointwise(f"{path}/conv3", f"{name}.conv3.conv", bias=False),
        *norm(f"{path}/norm3", f"{name}.conv3.bn"),
        *pointwise(f"{path}/shortcut", f"{name}.downsample.conv", bias=False),
        *norm(f"{path}/shortcut_norm", f"{name}.downsample.bn"),
    )


def _c_abstractor(count: int) -> list[Rule]:
    rules = [
        rule
        for stage, place in (("stage1", 0), ("stage2", 2))
        for i in range(count)
        for rule in _regnet_block(f"{stage}_{i}", f"net.{place}.b{i + 1}")
    ]
    rules += [rule for i in range(count) for rule in linear(f"layer_{i}", f"readout.{2 * i}")]
    return [
        *rules,
        Rule("position_table", "pos_emb", TOKENS),
        Rule("end_tokens", "eos_tokens", TOKENS),
        *norm("prenorm", "prenorm"),
    ]


def _resampler(count: int) -> list[Rule]:
    rules = [
        Rule("queries", "query_tokens", TOKENS),
        *linear("input", "visual_input_fc"),
        *linear("output", "visual_output_fc"),
        Rule("position_table", "pos_emb", TOKENS),
        Rule("end_tokens", "vit_eos", TOKENS),
    ]
    for i in range(count):
        name = f"encoder.layers.{i}.crossattention"
        rules += [
            *norm(f"block_{i}/query_norm", f"{name}.norm1"),
            *norm(f"block_{i}/patch_norm", f"{name}.normk"),
            *linear(f"block_{i}/q", f"{name}.attention.query"),
            *linear(f"block_{i}/k", f"{name}.attention.key"),
            *linear(f"block_{i}/v", f"{name}.attention.value"),
            *linear(f"block_{i}/out", f"{name}.output.out_proj"),
            *norm(f"block_{i}/mlp_norm", f"{name}.output.norm2"),
            *linear(f"block_{i}/w1", f"{name}.output.mlp.w1"),
            *linear(f"block_{i}/w2", f"{name}.output.mlp.w2"),
            *linear(f"block_{i}/w3", f"{name}.output.mlp.w3"),
            *norm(f"block_{i}/inner_norm", f"{name}.output.mlp.ffn_ln"),
        ]
    return rules


def _d_abstractor(count: int) -> list[Rule]:
    rules = [
        Rule("queries", "query_position_embeddings.weight"),
        Rule("references", "reference_points", TOKENS),
        *linear("input", "input_proj.0"),
        *linear("output", "output_proj"),
        Rule("position_table", "v_pos_emb", TOKENS),
        Rule("end_tokens", "eos_tokens", TOKENS),
    ]
    for i in range(count):
        name = f"layers.{i}"
        rules += [
            *(r for x in "qkv" for r in linear(f"block_{i}/self_{x}", f"{name}.self_attn.{x}_proj")),
            *linear(f"block_{i}/self_out", f"{name}.self_attn.out_proj"),
            *norm(f"block_{i}/self_norm", f"{name}.self_attn_layer_norm"),
            *linear(f"block_{i}/offsets", f"{name}.encoder_attn.sampling_offsets"),
            *linear(f"block_{i}/weights", f"{name}.encoder_attn.attention_weights"),
            *linear(f"block_{i}/value", f"{name}.encoder_attn.value_proj"),
            *linear(f"block_{i}/out", f"{name}.encoder_attn.output_proj"),
            *norm(f"block_{i}/cross_norm", f"{name}.encoder_attn_layer_norm"),
            *linear(f"block_{i}/fc1", f"{name}.fc1"),
            *linear(f"block_{i}/fc2", f"{name}.fc2"),
            *norm(f"block_{i}/mlp_norm", f"{name}.final_layer_norm"),
        ]
    return rules


def honeybee_rules(config: ModelConfig, shapes: Mapping[str, Shape]) -> tuple[Rule, ...]:
    """Honeybee's C-Abstractor, D-Abstractor and resampler, without their `abstractor.` prefix."""
    tables = {"c_abstractor": _c_abstractor, "resampler": _resampler, "d_abstractor": _d_abstractor}
    if config.connector not in tables:
        raise ValueError(
            f"the honeybee layout has no names for connector {config.connector!r}; it has them for {', '.join(tables)}"
        )
    count = 1 + max(
        (int(part) for path in shapes for part in path.split("/")[0].split("_") if part.isdigit()), default=0
    )
    rules = (rule for rule in tables[config.connector](count) if rule.path in shapes)
    return tuple(
        Rule(rule.path, rule.name, patch_table(shapes[rule.path][0]))
        if rule.path == "position_table" and config.connector == "c_abstractor"
        else rule
        for rule in rules
    )


__all__ = ["PROJECTORS", "SPELLINGS", "connector_part", "connector_shapes", "separators_part"]
