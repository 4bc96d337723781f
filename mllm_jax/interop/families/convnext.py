"""ConvNeXt of timm and OpenCLIP (Mini-Gemini's second encoder): `config.json` or `open_clip_config.json`.

Weights are named as timm names them, in OpenCLIP's checkpoints behind `visual.trunk.`; in Mini-Gemini's the stem and
the stages are apart. Norm and head behind the last stage are not used.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_jax import limits
from mllm_jax.interop.families.base import Family, Json, check_geometry, check_sizes
from mllm_jax.interop.rules import CONVOLUTION, Rule, linear, norm, patch_kernel
from mllm_jax.models.convnext import PATCH, ConvNextConfig

MODEL_TYPE = "timm_convnext"  # ours: neither timm nor OpenCLIP writes one
# timm's name -> blocks and channels of the stages, eps of the norms.
MODELS: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 1e-6),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768), 1e-6),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024), 1e-6),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),
    "convnext_large_mlp": ((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),  # of which only the head differs
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048), 1e-6),
    "convnext_xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5),
}


@dataclasses.dataclass(frozen=True)
class TimmFamily(Family):
    """A family whose config.json transformers does not know."""

    def config(self, fields: Json) -> ConvNextConfig:
        """The encoder of a description in timm's words (`described`).

        Raises:
          ValueError: naming the key.
        """
        check_sizes(fields)
        try:
            config = self.read(fields)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a timm configuration ({type(error).__name__}: {error})") from None
        check_geometry(config)
        return config


def described(fields: Json) -> dict[str, Any]:
    """timm's `config.json`, or an `open_clip_config.json`, in timm's words and with our `model_type`; others as is."""
    if isinstance(model := fields.get("model_cfg"), Mapping) and isinstance(model.get("vision_cfg"), Mapping):
        vision, processor = model["vision_cfg"], fields.get("preprocess_cfg")
        size = vision.get("image_size")
        return {
            "model_type": MODEL_TYPE,
            "architecture": vision.get("timm_model_name"),
            "pretrained_cfg": {
                **(processor if isinstance(processor, Mapping) else {}),
                "input_size": [3, size, size],
            },
        }
    if "model_type" not in fields and str(fields.get("architecture")).startswith("convnext"):
        return {**fields, "model_type": MODEL_TYPE}
    return dict(fields)


def read(fields: Json) -> ConvNextConfig:
    """The encoder of a timm description."""
    if (name := fields["architecture"]) not in MODELS:
        raise ValueError(
            f"architecture (timm_model_name) {name!r} is not supported; supported: {', '.join(MODELS)}"
        )
    depths, widths, eps = MODELS[name]
    changes = dict(fields.get("model_args") or {})
    depths, widths = changes.pop("depths", depths), changes.pop("dims", widths)
    eps = changes.pop("norm_eps", None) or eps
    if changes:
        raise ValueError(f"model_args.{min(changes)}={changes[min(changes)]!r} is not supported")
    trained = fields["pretrained_cfg"]
    _, height, width = trained["input_size"]
    limits.check("MAX_IMAGE_SIDE", height, "pretrained_cfg.input_size")
    if height != width:
        raise ValueError(f"pretrained_cfg.input_size={trained['input_size']!r} is not square")
    known = {key: tuple(map(float, trained[key])) for key in ("mean", "std") if trained.get(key)}
    return ConvNextConfig(tuple(map(int, widths)), tuple(map(int, depths)), int(height), float(eps), **known)


def write(config: ConvNextConfig) -> dict[str, Any]:
    """timm's config.json, which `timm.create_model("local-dir:...")` reads."""
    geometry = (config.depths, config.widths, config.eps)
    name = next((name for name, known in MODELS.items() if known == geometry), "convnext_large")
    return {
        "architecture": name,
        "num_classes": 0,
        "model_args": {"depths": list(config.depths), "dims": list(config.widths), "norm_eps": config.eps},
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": 0,
        },
        "model_type": MODEL_TYPE,
    }


def rules(config: ConvNextConfig) -> tuple[Rule, ...]:
    """The weight-name table."""
    table = [
        Rule("stem/kernel", "stem.0.weight", patch_kernel(PATCH)),
        Rule("stem/bias", "stem.0.bias"),
        *norm("stem_norm", "stem.1"),
    ]
    for index, depth in enumerate(config.depths):
        ours, theirs = f"stage_{index}", f"stages.{index}"
        if index:
            kernel = patch_kernel(2, config.widths[index - 1])
            table += [
                *norm(f"{ours}/norm", f"{theirs}.downsample.0"),
                Rule(f"{ours}/down/kernel", f"{theirs}.downsample.1.weight", kernel),
                Rule(f"{ours}/down/bias", f"{theirs}.downsample.1.bias"),
            ]
        ours, theirs = f"{ours}/blocks", f"{theirs}.blocks.{{i}}"
        blocks = (
            Rule(f"{ours}/conv/kernel", f"{theirs}.conv_dw.weight", CONVOLUTION),
            Rule(f"{ours}/conv/bias", f"{theirs}.conv_dw.bias"),
            *norm(f"{ours}/norm", f"{theirs}.norm"),
            *linear(f"{ours}/fc1", f"{theirs}.mlp.fc1"),
            *linear(f"{ours}/fc2", f"{theirs}.mlp.fc2"),
            Rule(f"{ours}/gamma", f"{theirs}.gamma"),
        )
        table += [dataclasses.replace(rule, blocks=depth) for rule in blocks]
    return tuple(table)


FAMILY = TimmFamily(
    model_type=MODEL_TYPE,
    architecture="timm ConvNeXt",
    read=read,
    write=write,
    rules=rules,
    ignored=((r"(head|norm_pre)\..*", "the norm and head behind the last stage are not part of the maps"),),
    spellings=(
        (("visual.trunk.", ""),),
        (
            ("model.vision_tower_aux.vision_stem.", "stem."),
            ("model.vision_tower_aux.vision_stages.", "stages."),
        ),
    ),
)
