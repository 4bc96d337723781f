"""SigLIP 2 with native aspect ratio (NaFlex): patches as a linear layer, table resized with antialiasing.

The fixed-resolution SigLIP 2 checkpoints are plain `siglip` ones.
"""

import dataclasses
import math
from typing import Any

from mllm_jax.interop.families import siglip
from mllm_jax.interop.families.base import Family, Json
from mllm_jax.interop.rules import TRANSPOSE, Rule
from mllm_jax.models.vit import VisionConfig


def read(fields: Json) -> VisionConfig:
    """The tower of a siglip2_vision_model config; `image_size` is that of its square position table."""
    side = math.isqrt(fields["num_patches"])
    if side * side != fields["num_patches"]:
        raise ValueError(
            f"num_patches={fields['num_patches']} is no square; tables of square grids are supported"
        )
    config = siglip.tower(fields, side * fields["patch_size"])
    return dataclasses.replace(config, interpolation="bilinear_antialias")


def write(config: VisionConfig) -> dict[str, Any]:
    """A siglip2_vision_model config without the pooling head."""
    fields = siglip.write(config)
    del fields["image_size"]
    rows, columns = config.grid(config.image_size)
    return {
        **fields,
        "model_type": "siglip2_vision_model",
        "architectures": ["Siglip2VisionModel"],
        "num_patches": rows * columns,
    }


def rules(config: VisionConfig) -> tuple[Rule, ...]:
    """SigLIP's table but for the patch layer, whose input is (row, column, channel) like ours."""
    patches = Rule("patch_embed/kernel", "embeddings.patch_embedding.weight", TRANSPOSE)
    return tuple(patches if rule.path == patches.path else rule for rule in siglip.rules(config))


FAMILY = Family(
    model_type="siglip2_vision_model",
    architecture="Siglip2VisionModel",
    read=read,
    write=write,
    rules=rules,
    ignored=siglip.FAMILY.ignored,
    fillers=siglip.FAMILY.fillers,
)
