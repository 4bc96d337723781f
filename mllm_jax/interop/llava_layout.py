"""Whole models in LLaVA's own layout (haotian-liu/LLaVA, LLaVA-1.6, Dense Connector), which `import` reads again.

config.json          the LLM's, with LLaVA's `mm_...` entries
model*.safetensors   LLM, `model.mm_projector.*`, `model.image_newline`, and the tower that was trained with them
"""

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from mllm_jax import files
from mllm_jax.interop import families, native, recorded, special_tokens, tile_fields, video_fields
from mllm_jax.interop.assemble import write_plan
from mllm_jax.interop.composite import LLAVA_TYPES, read_composite
from mllm_jax.interop.connector_names import connector_part, separators_part
from mllm_jax.interop.llava_fields import write_fields
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.models.vit import VisionConfig

TOWER = "model.vision_tower.vision_tower."


def save_llava(
    directory: str | pathlib.Path,
    model: ModelConfig,
    params: Params,
    tower: str,
    tokenizer: Any = None,
    dtype: Any = None,
    generation: Mapping[str, Any] | None = None,
    aspect: str = "pad",
) -> None:
    """Writes a model in the layout of LLaVA's code, with the connectors that it and Dense Connector have.

    The blocks of the vision tower that are used lie in the checkpoint, as those of a tower that was trained; what tower
    it is, is known by its name alone.

    Args:
      tower: where LLaVA finds the vision tower, a directory or hub id.
      tokenizer, dtype, generation: as in `checkpoints.save_llava_hf`.
      aspect: how images that are not square are brought to size.

    Raises:
      ValueError: something that this layout cannot say; it is named.
      FileExistsError: the directory holds files already.
    """
    directory = pathlib.Path(directory)
    native.refuse_existing(directory)
    fields = config_fields(model, tower, aspect) | {"unfreeze_mm_vision_tower": True}
    generation = special_tokens.generation(None, tokenizer) if generation is None else generation
    encoder, llm = (
        families.for_config(table, part)
        for table, part in ((families.VISION, model.vision), (families.LLMS, model.llm))
    )
    prefix = TOWER if encoder.model_type.startswith("dinov2") else f"{TOWER}vision_model."
    tensors = [
        *write_plan(params["vision"], encoder.rules(model.vision), dtype, (("", prefix),)),
        *write_plan(params["connector"], connector_part(model, "llava").rules, dtype, (("", "model."),)),
        *write_plan(params["llm"], llm.rules(model.llm), dtype),
    ]
    if "separators" in params:
        tensors = [
            *write_plan(params["separators"], separators_part(model).rules, dtype, (("", "model."),)),
            *tensors,
        ]
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        special_tokens.save_tokenizer(directory, tokenizer)
    special_tokens.write(directory, generation)
    fields |= {"torch_dtype": str(tensors[-1][1]), **special_tokens.for_config(generation)}
    files.write_json(directory / "config.json", fields, indent=2)
    write_sharded(directory, tensors)


def config_fields(model: ModelConfig, tower: str, aspect: str) -> dict[str, Any]:
    """The contents of LLaVA's config.json.

    Args:
      tower, aspect: as in `save_llava`.

    Raises:
      ValueError: read again, it describes another model, or LLaVA has no class for the LLM.
    """
    if not isinstance(model.vision, VisionConfig) or model.max_patches:
        raise ValueError(
            "LLaVA's config.json names one vision tower of patch tokens, at one size; export plain safetensors or "
            "Orbax instead"
        )
    fields = families.for_config(families.LLMS, model.llm).write(model.llm)
    kinds = [name for name, llm in LLAVA_TYPES.items() if llm == fields["model_type"] and name != "llava"]
    if not kinds:
        raise ValueError(f"LLaVA has no class for an LLM of type {fields['model_type']!r}")
    fields.pop("architectures", None)
    fields |= {"model_type": kinds[0], "mm_vision_tower": tower, **write_fields(model)}
    fields |= tile_fields.write_llava(model.tiles, model.vision.image_size, aspect)
    fields |= video_fields.write_llava(model.video)
    with tempfile.TemporaryDirectory() as folder:
        files.write_json(pathlib.Path(folder) / "config.json", fields)
        found = read_composite(folder, tower).model
    here, there = (_described(each) for each in (model, found))
    if different := [key for key in here if here[key] != there.get(key)]:
        key = min(
            different, key=lambda key: (not key.startswith("model."), key)
        )  # a key of a config, if it is one
        raise ValueError(f"LLaVA's config.json cannot say {key}={here[key]!r}; it means {there.get(key)!r}")
    return fields


def _described(model: ModelConfig) -> dict[str, Any]:
    newline = model.video.newline if model.video else "no_token"
    return recorded.described(model) | {"model.tiles": model.tiles, "model.video.newline": newline}
