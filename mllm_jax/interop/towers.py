"""Vision towers and LLMs in and out of Hugging Face checkpoint directories."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.interop import families
from mllm_jax.interop.assemble import Report, Shape, plan, read_tree, write_plan
from mllm_jax.interop.families.base import Family, complete
from mllm_jax.interop.hub import load_processor_config, read_json, resolve_path
from mllm_jax.interop.safetensors_io import write_safetensors
from mllm_jax.interop.source import Source
from mllm_jax.models.decoder import Decoder, DecoderConfig
from mllm_jax.models.paths import flatten
from mllm_jax.models.vit import VisionConfig, VisionTransformer

Params = dict[str, Any]

# Where a tower may hang in a checkpoint: the hub's composites, LLaVA's own layout, transformers 5.
VISION_PREFIXES = (
    "",
    "vision_model.",
    "vision_tower.",
    "vision_tower.vision_model.",
    "model.vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.vision_tower.",
    "model.vision_tower.vision_tower.vision_model.",
)
# Spellings of an LLM: ((their prefix, ours), ...). The first whose embedding is found counts.
LLM_SPELLINGS = (
    (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    (("model.language_model.", "model."), ("lm_head.", "lm_head.")),
    (("model.", "model."), ("lm_head.", "lm_head.")),
    (("", "model."), ("lm_head.", "lm_head.")),
)
PART_TYPES = {
    ("clip", "vision_config"): "clip_vision_model",
    ("siglip", "vision_config"): "siglip_vision_model",
    ("siglip2", "vision_config"): "siglip2_vision_model",
    ("llava", "vision_config"): "clip_vision_model",
    ("llava", "text_config"): "llama",
}
OTHER_PARTS = "belongs to another part of the checkpoint"
VISION_NEIGHBOURS = (
    (r"text_model\..*", OTHER_PARTS),
    (r"(visual_projection|text_projection)\..*|logit_scale|logit_bias", OTHER_PARTS),
    (r"(model\.)?language_model\..*|lm_head\..*|(model\.)?multi_modal_projector\..*", OTHER_PARTS),
    (r"model\.(mm_projector|embed_tokens|layers|norm)\..*|(model\.)?image_newline", OTHER_PARTS),
)
LLM_NEIGHBOURS = (
    (r"(model\.)?(vision_tower|vision_model|multi_modal_projector|mm_projector)\..*", OTHER_PARTS),
    (r"(model\.)?image_newline", OTHER_PARTS),
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


def vision_shapes(config: VisionConfig, depth: int | None = None) -> dict[str, Shape]:
    """{path: shape} of a tower's parameters, `depth` blocks deep (all by default)."""
    tower = VisionTransformer(config, FeatureRequest(hidden=(config.depth if depth is None else depth,)))
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    params = jax.eval_shape(tower.init, jax.random.key(0), image)["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def llm_shapes(config: DecoderConfig) -> dict[str, Shape]:
    """{path: shape} of an LLM's parameters."""
    ints = jnp.zeros((1, 1), jnp.int32)

    def everything(decoder: Decoder) -> Any:
        hidden, _ = decoder(decoder.embed(ints), ints, ints)
        return decoder.logits(hidden)

    params = jax.eval_shape(lambda key: Decoder(config).init(key, method=everything), jax.random.key(0))[
        "params"
    ]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def read_vision(
    source: Source, config: VisionConfig, family: Family, depth: int | None = None, dtype: Any = None
) -> tuple[Params, Report]:
    """A tower's parameters from any checkpoint that holds one, and what was ignored."""
    shapes, rules = vision_shapes(config, depth), family.rules(config)
    anchor = rules[0].name
    prefixes = [p for p in VISION_PREFIXES if p + anchor in source]
    if len(prefixes) != 1:
        raise ValueError(
            f"{source.directory} holds {len(prefixes)} {family.model_type} towers ({anchor!r}), not one"
        )

    def canonical(name: str) -> str | None:
        return name.removeprefix(prefixes[0]) if name.startswith(prefixes[0]) else None

    placements, report = plan(source, rules, shapes, canonical, (*family.ignored, *VISION_NEIGHBOURS))
    return read_tree(source, placements, shapes, dtype), report


def read_llm(
    source: Source, config: DecoderConfig, family: Family, dtype: Any = None
) -> tuple[Params, Report]:
    """An LLM's parameters from any checkpoint that holds one, and what was ignored."""
    shapes, rules = llm_shapes(config), family.rules(config)
    anchor = rules[0].name
    for spelling in LLM_SPELLINGS:
        theirs, ours = spelling[0]
        if theirs + anchor.removeprefix(ours) in source:
            break
    else:
        raise ValueError(f"{source.directory} holds no {family.model_type} LLM (tensor {anchor!r})")

    def canonical(name: str) -> str | None:
        for theirs, ours in reversed(spelling):  # the head first: the body's prefix may be empty
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return None

    ignored = (*family.ignored, *LLM_NEIGHBOURS)
    if config.tied:
        ignored += ((r"lm_head\.weight", "a copy of the tied embedding"),)
    placements, report = plan(source, rules, shapes, canonical, ignored)
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
    params, report = read_vision(Source(resolve_path(path, "mini_vit")), config, family, depth, dtype)
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
    params, report = read_llm(Source(resolve_path(path, "mini_llm")), config, family, dtype)
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
