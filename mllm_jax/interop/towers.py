"""Vision towers and LLMs in and out of Hugging Face checkpoint directories."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from mllm_jax.interop import families
from mllm_jax.interop.assemble import Report, read_tree, write_plan
from mllm_jax.interop.families.base import Family, complete
from mllm_jax.interop.hub import load_processor_config, read_json, resolve_path
from mllm_jax.interop.parts import Part, llm_part, plan_parts, vision_part
from mllm_jax.interop.safetensors_io import write_safetensors
from mllm_jax.interop.source import Source
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.vit import VisionConfig

Params = dict[str, Any]

PART_TYPES = {
    ("clip", "vision_config"): "clip_vision_model",
    ("siglip", "vision_config"): "siglip_vision_model",
    ("siglip2", "vision_config"): "siglip2_vision_model",
    ("llava", "vision_config"): "clip_vision_model",
    ("llava", "text_config"): "llama",
}
OTHER_PARTS = "belongs to another part of the checkpoint"
CONNECTOR_NAMES = r"(model\.)?(multi_modal_projector|mm_projector|image_newline|abstractor)(\..*)?"
VISION_NEIGHBOURS = (
    (r"text_model\..*", OTHER_PARTS),
    (r"(visual_projection|text_projection)\..*|logit_scale|logit_bias", OTHER_PARTS),
    (r"(model\.)?language_model\..*|lm_head\..*|model\.(embed_tokens|layers|norm)\..*", OTHER_PARTS),
    (CONNECTOR_NAMES, OTHER_PARTS),
)
LLM_NEIGHBOURS = (
    (r"(model\.)?(vision_tower|vision_model)\..*", OTHER_PARTS),
    (CONNECTOR_NAMES, OTHER_PARTS),
)


def _read_config(
    path: str | pathlib.Path, table: Mapping[str, Family], part: str, shipped: str
) -> tuple[Any, Family]:
    file = resolve_path(path, shipped) / "config.json"
    fields = read_json(file)
    if fields.get("model_type") not in table and isinstance(fields.get(part), dict):
        inner = dict(fields[part])
        # Older composites do not name the type of their parts.
        inner.setdefault("model_type", PART_TYPES.get((fields.get("model_type"), part)))
        fields = inner
    family = families.for_type(dict(table), fields.get("model_type"), str(file))
    return family.read(complete(family.model_type, fields)), family


def vision_config(path: str | pathlib.Path) -> VisionConfig:
    """The tower of a checkpoint: its own config.json or a composite's `vision_config`, and its normalisation.

    Raises:
      FileNotFoundError: no such checkpoint.  ValueError: a family that is not supported.
    """
    config, _ = _read_config(path, families.VISION, "vision_config", "mini_vit")
    processor = load_processor_config(path)
    if "image_mean" in processor:
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
        config = dataclasses.replace(config, mean=mean, std=std)
    return config


def llm_config(path: str | pathlib.Path) -> DecoderConfig:
    """The decoder of a checkpoint: its own config.json or a composite's `text_config`.

    Raises:
      FileNotFoundError: no such checkpoint.  ValueError: a family that is not supported.
    """
    return _read_config(path, families.LLMS, "text_config", "mini_llm")[0]


def _read(source: Source, part: Part, neighbours: tuple, dtype: Any) -> tuple[Params, Report]:
    placements, shapes, report = plan_parts(source, [part], neighbours)
    return read_tree(source, placements, shapes, dtype), report


def _log(path: Any, report: Report) -> None:
    logging.info("%s: %d tensors read, %d ignored", path, len(report.used), len(report.ignored))
    for name, why in report.ignored.items():
        logging.debug("ignored %s: %s", name, why)


def load_vision(path: str | pathlib.Path, depth: int | None = None, dtype: Any = None) -> Params:
    """Parameters of a vision tower as nested dicts of NumPy arrays, blocks stacked on axis 0.

    Args:
      path: "mini", a directory or a hub id.
      depth: blocks wanted (the deepest hidden state used); all by default. Deeper ones are not read.
      dtype: of the result; None keeps the checkpoint's.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    config, family = _read_config(path, families.VISION, "vision_config", "mini_vit")
    if depth is not None and not 0 <= depth <= config.depth:
        raise ValueError(f"{path}: {depth} blocks asked for, the tower has {config.depth}")
    params, report = _read(
        Source(resolve_path(path, "mini_vit")), vision_part(config, family, depth), VISION_NEIGHBOURS, dtype
    )
    _log(path, report)
    return params


def load_llm(path: str | pathlib.Path, dtype: Any = None) -> Params:
    """Parameters of an LLM as nested dicts of NumPy arrays, blocks stacked on axis 0.

    Args:
      path: "mini", a directory or a hub id.
      dtype: of the result; None keeps the checkpoint's.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    config, family = _read_config(path, families.LLMS, "text_config", "mini_llm")
    params, report = _read(
        Source(resolve_path(path, "mini_llm")), llm_part(config, family), LLM_NEIGHBOURS, dtype
    )
    _log(path, report)
    return params


def _write(directory: pathlib.Path, family: Family, config: Any, params: Params, dtype: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = write_plan(params, family.rules(config), dtype)
    filler_dtype = tensors[0][1]
    for name, shape, value in family.fillers(config):
        tensors.append((name, filler_dtype, shape, lambda s=shape, v=value: np.full(s, v, filler_dtype)))
    fields = {**family.write(config), "torch_dtype": str(np.dtype(filler_dtype))}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    write_safetensors(directory / "model.safetensors", tensors)


def save_vision(
    directory: str | pathlib.Path, config: VisionConfig, params: Params, dtype: Any = None
) -> None:
    """Writes a tower that transformers' `from_pretrained` loads.

    A tower without class token becomes a SiglipVisionModel without pooling head, others a CLIPVisionModel.
    Their final norm, which we neither have nor use, is written as the identity. A tower shorter than
    `config.depth` (truncated at the deepest hidden state used) is written with the blocks it has.

    Args:
      dtype: to store; None keeps the parameters'.

    Raises:
      ValueError: no family can express the config.
    """
    depth = next(iter(jax.tree.leaves(params.get("blocks", {}))), np.zeros(0)).shape[0]
    config = dataclasses.replace(config, depth=depth)
    directory = pathlib.Path(directory)
    _write(directory, families.for_config(families.VISION, config), config, params, dtype)
    processor = {
        "image_processor_type": "SiglipImageProcessor" if not config.class_token else "CLIPImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    if config.class_token:
        processor["size"] = {"shortest_edge": config.image_size}
        processor |= {
            "do_center_crop": True,
            "crop_size": {"height": config.image_size, "width": config.image_size},
        }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def save_llm(
    directory: str | pathlib.Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Any = None,
    dtype: Any = None,
) -> None:
    """Writes an LLM that transformers' `from_pretrained` loads, with its tokenizer if given.

    Args:
      dtype: to store; None keeps the parameters'.

    Raises:
      ValueError: no family can express the config.
    """
    directory = pathlib.Path(directory)
    _write(directory, families.for_config(families.LLMS, config), config, params, dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
