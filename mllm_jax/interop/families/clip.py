"""CLIP vision towers (connectors.md 1.1)."""

from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.interop.rules import Rule, linear, norm, patch_kernel
from mllm_jax.models.vit import VisionConfig


def read(fields: Json) -> VisionConfig:
    """The tower of a clip_vision_model config."""
    return VisionConfig(
        width=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        patch=fields["patch_size"],
        image_size=fields["image_size"],
        activation=our_activation(fields["hidden_act"]),
        eps=float(fields["layer_norm_eps"]),
    )


def write(config: VisionConfig) -> dict:
    """A clip_vision_model config."""
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "patch_size": config.patch,
        "image_size": config.image_size,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.eps,
    }


def blocks() -> tuple[Rule, ...]:
    """Encoder blocks, the same in CLIP and SigLIP."""
    layer = "encoder.layers.{i}"
    return (
        *norm("blocks/norm1", f"{layer}.layer_norm1"),
        *norm("blocks/norm2", f"{layer}.layer_norm2"),
        *linear("blocks/q", f"{layer}.self_attn.q_proj"),
        *linear("blocks/k", f"{layer}.self_attn.k_proj"),
        *linear("blocks/v", f"{layer}.self_attn.v_proj"),
        *linear("blocks/out", f"{layer}.self_attn.out_proj"),
        *linear("blocks/fc1", f"{layer}.mlp.fc1"),
        *linear("blocks/fc2", f"{layer}.mlp.fc2"),
    )


def rules(config: VisionConfig) -> tuple[Rule, ...]:
    """The weight-name table."""
    return (
        Rule("patch_embed/kernel", "embeddings.patch_embedding.weight", patch_kernel(config.patch)),
        Rule("class_token", "embeddings.class_embedding"),
        Rule("pos_embed", "embeddings.position_embedding.weight"),
        *norm("pre_norm", "pre_layrnorm"),
        *blocks(),
    )


FAMILY = Family(
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    read=read,
    write=write,
    rules=rules,
    ignored=(
        (r"post_layernorm\.(weight|bias)", "hidden states are used without the final norm"),
        (r"embeddings\.position_ids", "a constant"),
    ),
    fillers=lambda config: (
        ("post_layernorm.weight", (config.width,), 1.0),
        ("post_layernorm.bias", (config.width,), 0.0),
    ),
)
