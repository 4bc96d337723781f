"""DINOv2, with and without registers: layer scale, class token, bias on the patches, no pre-norm."""

from typing import Any

from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.interop.rules import Rule, Transform, linear, norm, patch_kernel
from mllm_jax.models.vit import VisionConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYER = "encoder.layer.{i}"
TOKEN = Transform(lambda x: x.squeeze((0, 1)), lambda x: x[None, None])  # [1, 1, C] <-> [C]
TABLE = Transform(lambda x: x.squeeze(0), lambda x: x[None])  # [1, N, C] <-> [N, C]


def _gated_width(width: int, ratio: int | float) -> int:
    """Hidden width of the SwiGLU: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


def read(fields: Json) -> VisionConfig:
    """The tower of a dinov2 or dinov2_with_registers config."""
    if not fields["qkv_bias"]:
        raise ValueError("DINOv2 with qkv_bias=false is not supported (no released checkpoint has it)")
    width, gated = fields["hidden_size"], fields["use_swiglu_ffn"]
    ratio = fields["mlp_ratio"]
    registers = fields.get("num_register_tokens", 0)
    return VisionConfig(
        width=width,
        depth=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=_gated_width(width, ratio) if gated else int(width * ratio),
        patch=fields["patch_size"],
        image_size=fields["image_size"],
        activation=our_activation(fields["hidden_act"]),
        eps=float(fields["layer_norm_eps"]),
        class_token=True,
        pre_norm=False,
        patch_bias=True,
        interpolation="bicubic_antialias" if registers else "bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        registers=registers,
        layer_scale=True,
        gated=gated,
    )


def _write(config: VisionConfig, model_type: str, architecture: str) -> dict[str, Any]:
    ratio = config.mlp_width / config.width
    if config.gated:
        ratio = next(
            (r for r in (ratio * 1.5, 4) if _gated_width(config.width, r) == config.mlp_width), ratio
        )
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "patch_size": config.patch,
        "image_size": config.image_size,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.eps,
        "use_swiglu_ffn": config.gated,
    }


def write_plain(config: VisionConfig) -> dict[str, Any]:
    """A dinov2 config."""
    return _write(config, "dinov2", "Dinov2Model")


def write_registers(config: VisionConfig) -> dict[str, Any]:
    """A dinov2_with_registers config."""
    fields = _write(config, "dinov2_with_registers", "Dinov2WithRegistersModel")
    return {**fields, "num_register_tokens": config.registers}


def rules(config: VisionConfig) -> tuple[Rule, ...]:
    """The weight-name table."""
    attention = f"{LAYER}.attention.attention"
    mlp = ("weights_in", "weights_out") if config.gated else ("fc1", "fc2")
    return (
        Rule(
            "patch_embed/kernel",
            "embeddings.patch_embeddings.projection.weight",
            patch_kernel(config.patch),
        ),
        Rule("patch_embed/bias", "embeddings.patch_embeddings.projection.bias"),
        Rule("class_token", "embeddings.cls_token", TOKEN),
        Rule("pos_embed", "embeddings.position_embeddings", TABLE),
        *((Rule("registers", "embeddings.register_tokens", TABLE),) if config.registers else ()),
        *norm("blocks/norm1", f"{LAYER}.norm1"),
        *linear("blocks/q", f"{attention}.query"),
        *linear("blocks/k", f"{attention}.key"),
        *linear("blocks/v", f"{attention}.value"),
        *linear("blocks/out", f"{LAYER}.attention.output.dense"),
        Rule("blocks/scale1", f"{LAYER}.layer_scale1.lambda1"),
        *norm("blocks/norm2", f"{LAYER}.norm2"),
        *linear("blocks/fc1", f"{LAYER}.mlp.{mlp[0]}"),
        *linear("blocks/fc2", f"{LAYER}.mlp.{mlp[1]}"),
        Rule("blocks/scale2", f"{LAYER}.layer_scale2.lambda1"),
    )


IGNORED = (
    (r"layernorm\.(weight|bias)", "hidden states are used without the final norm"),
    (r"embeddings\.mask_token", "used in pretraining only"),
    (r"classifier\..*", "an image classifier on top"),
)


def _fillers(config: VisionConfig) -> tuple[tuple[str, tuple[int, ...], float], ...]:
    return (
        ("layernorm.weight", (config.width,), 1.0),
        ("layernorm.bias", (config.width,), 0.0),
        ("embeddings.mask_token", (1, config.width), 0.0),
    )


FAMILY = Family("dinov2", "Dinov2Model", read, write_plain, rules, IGNORED, _fillers)
WITH_REGISTERS = Family(
    "dinov2_with_registers", "Dinov2WithRegistersModel", read, write_registers, rules, IGNORED, _fillers
)
