"""Names of connectors in the checkpoints of MobileVLM, TokenPacker, InternVL, Idefics3 and BLIP-2, and our own.

Sources: Meituan-AutoML/MobileVLM `mobilevlm/model/vision_projector.py` (with torchvision's InvertedResidual),
CircleRadon/TokenPacker `llava/model/multimodal_projector/builder.py`,
OpenGVLab/InternVL `modeling_internvl_chat.py`, transformers `models/{internvl,idefics3,blip_2}`.
"""

from collections.abc import Callable, Mapping

from mllm_jax.interop.rules import CONVOLUTION, Rule, Transform, attention_inputs, linear, norm
from mllm_jax.models.mllm import ModelConfig

Shape = tuple[int, ...]

TOKENS = Transform(lambda x: x.squeeze(0), lambda x: x[None])  # [1, N, C] <-> [N, C]
POINTWISE = Transform(
    lambda x: x.squeeze((2, 3)).T, lambda x: x.T[:, :, None, None]
)  # 1x1 convolution <-> kernel


def pointwise(path: str, name: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rows of a torch 1x1 convolution and our Dense."""
    rules = (Rule(f"{path}/kernel", f"{name}.weight", POINTWISE),)
    return (*rules, Rule(f"{path}/bias", f"{name}.bias")) if bias else rules


def ldp_rules() -> tuple[Rule, ...]:
    """MobileVLM's projector; of its blocks (torchvision's InvertedResidual) part 0 and 2 are convolution and norm."""
    rules = [*linear("layer_0", "mm_projector.model.mlp.1"), *linear("layer_1", "mm_projector.model.mlp.3")]
    for i in (0, 1):
        path, name = f"block_{i}", f"mm_projector.model.mb_block.{i + 1}.block"
        rules += [
            Rule(f"{path}/depthwise/kernel", f"{name}.0.0.weight", CONVOLUTION),
            *norm(f"{path}/depthwise_norm", f"{name}.0.1"),
            *pointwise(f"{path}/squeeze", f"{name}.1.fc1"),
            *pointwise(f"{path}/excite", f"{name}.1.fc2"),
            *pointwise(f"{path}/pointwise", f"{name}.2.0", bias=False),
            *norm(f"{path}/pointwise_norm", f"{name}.2.1"),
        ]
    return tuple(rules)


def ldpv2_rules() -> tuple[Rule, ...]:
    """MobileVLM V2's projector."""
    return (
        *linear("layer_0", "mm_projector.mlp.mlp.0"),
        *linear("layer_1", "mm_projector.mlp.mlp.2"),
        Rule("peg/kernel", "mm_projector.peg.peg.0.weight", CONVOLUTION),
        Rule("peg/bias", "mm_projector.peg.peg.0.bias"),
    )


def token_packer_rules() -> tuple[Rule, ...]:
    """TokenPacker's projector."""
    rules = [
        *linear("query", "mm_projector.q_proj_1", bias=False),
        *norm("query_norm", "mm_projector.ln_q_1"),
    ]
    for ours, letter in (("key", "k"), ("value", "v")):
        rules += linear(f"{ours}_0", f"mm_projector.{letter}_proj_1.0")
        rules += linear(f"{ours}_1", f"mm_projector.{letter}_proj_1.2")
        rules += norm(f"{ours}_norm", f"mm_projector.ln_{letter}_1")
    return (
        *rules,
        *attention_inputs("qkv", "mm_projector.clip_attn"),
        *linear("out", "mm_projector.clip_attn.out_proj"),
        *linear("layer_0", "mm_projector.mlp.0"),
        *linear("layer_1", "mm_projector.mlp.2"),
    )


def _internvl(names: tuple[str, str, str]) -> tuple[Rule, ...]:
    return (*norm("norm", names[0]), *linear("layer_0", names[1]), *linear("layer_1", names[2]))


def _blip2(shapes: Mapping[str, Shape]) -> tuple[Rule, ...]:
    """BLIP-2's Q-Former in transformers, with the norm before it and the projection behind it."""
    rules = [
        Rule("queries", "query_tokens", TOKENS),
        *norm("patch_norm", "vision_model.post_layernorm"),
        *norm("query_norm", "qformer.layernorm"),
        *linear("layer_0", "language_projection"),
    ]
    for i in range(sum(path.endswith("/fc1/kernel") for path in shapes)):
        path, name = f"block_{i}", f"qformer.encoder.layer.{i}"
        for ours, theirs in (("self", "attention"), ("cross", "crossattention")):
            if f"{path}/{ours}_q/kernel" in shapes:
                for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
                    rules += linear(f"{path}/{ours}_{letter}", f"{name}.{theirs}.attention.{word}")
                rules += linear(f"{path}/{ours}_out", f"{name}.{theirs}.output.dense")
                rules += norm(f"{path}/{ours}_norm", f"{name}.{theirs}.output.LayerNorm")
        rules += linear(f"{path}/fc1", f"{name}.intermediate_query.dense")
        rules += linear(f"{path}/fc2", f"{name}.output_query.dense")
        rules += norm(f"{path}/mlp_norm", f"{name}.output_query.LayerNorm")
    return tuple(rules)


def _of(connector: str, **options: str | int) -> Callable[[ModelConfig], bool]:
    return lambda config: (
        config.connector == connector
        and all(getattr(config.make_connector(), name) == value for name, value in options.items())
    )


# layout -> (whether it has the connector of a model, its table)
TABLES: dict[str, tuple[Callable[[ModelConfig], bool], Callable[[Mapping[str, Shape]], tuple[Rule, ...]]]] = {
    "internvl": (_of("pixel_shuffle", variant="internvl"), lambda shapes: _internvl(("0", "1", "3"))),
    "internvl-hf": (
        _of("pixel_shuffle", variant="internvl"),
        lambda shapes: _internvl(("layer_norm", "linear_1", "linear_2")),
    ),
    "idefics3": (
        _of("pixel_shuffle", variant="idefics3"),
        lambda shapes: linear("layer_0", "modality_projection.proj", bias=False),
    ),
    "blip2": (_of("q_former", variant="next", layers=1), _blip2),
    "mllm_jax": (lambda config: True, lambda shapes: tuple(Rule(path, path) for path in shapes)),
}
SPELLINGS = {
    "internvl": ((("mlp1.", ""),),),
    "internvl-hf": ((("multi_modal_projector.", ""),), (("model.multi_modal_projector.", ""),)),
    "idefics3": ((("model.connector.", ""),), (("connector.", ""),)),
    "blip2": ((("", ""),),),
    "mllm_jax": ((("connector/", ""),),),
}


def layout_rules(config: ModelConfig, shapes: Mapping[str, Shape], layout: str) -> tuple[Rule, ...]:
    """The table of one of `TABLES`.

    Raises:
      ValueError: it has no names for this connector.
    """
    has, table = TABLES[layout]
    if not has(config):
        raise ValueError(
            f"the {layout} layout has no names for connector {config.connector!r} with these options"
        )
    return table(shapes)
