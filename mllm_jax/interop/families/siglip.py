"""SigLIP vision towers (connectors.md 1.2); fixed-resolution SigLIP 2 checkpoints have the same layout."""

from mllm_jax.interop.families import clip
from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.families.names import activation_name, our_activation
from mllm_jax.interop.rules import Rule, patch_kernel
from mllm_jax.models.vit import VisionConfig


def read(fields: Json) -> VisionConfig:
    """The tower of a siglip_vision_model config."""
    return tower(fields, fields["image_size"])


def tower(fields: Json, image_size: int) -> VisionConfig:
    """A SigLIP or SigLIP 2 tower whose position table is for `image_size` pixels a side."""
    return VisionConfig(
        width=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        patch=fields["patch_size"],
        image_size=image_size,
        activation=our_activation(fields["hidden_act"]),
        eps=float(fields["layer_norm_eps"]),
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def write(config: VisionConfig) -> dict:
    """A siglip_vision_model config without the pooling head."""
    return {
        "model_type": "siglip_vision_model",
        "architectures": ["SiglipVisionModel"],
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "patch_size": config.patch,
        "image_size": config.image_size,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.eps,
        "vision_use_head": False,
    }


def rules(config: VisionConfig) -> tuple[Rule, ...]:
    """The weight-name table."""
    return (
        Rule("patch_embed/kernel", "embeddings.patch_embedding.weight", patch_kernel(config.patch)),
        Rule("patch_embed/bias", "embeddings.patch_embedding.bias"),
        Rule("pos_embed", "embeddings.position_embedding.weight"),
        *clip.blocks(),
    )


FAMILY = Family(
    model_type="siglip_vision_model",
    architecture="SiglipVisionModel",
    read=read,
    write=write,
    rules=rules,
    ignored=(*clip.FAMILY.ignored, (r"head\..*", "the pooling head is not part of the patch features")),
    fillers=clip.FAMILY.fillers,
)
