"""Vision towers and LLMs in and out of Hugging Face checkpoint directories."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from mllm_jax import files
from mllm_jax.interop import families, native, special_tokens
from mllm_jax.interop.assemble import Report, read_tree, write_plan
from mllm_jax.interop.composite import part_config, read_config, with_normalisation
from mllm_jax.interop.families.base import Family
from mllm_jax.interop.hub import resolve_path
from mllm_jax.interop.parts import Part, check_tied, llm_part, plan_parts, vision_part
from mllm_jax.interop.published import shipped_config
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.interop.source import Source
from mllm_jax.models import lora
from mllm_jax.models.convnext import ConvNextConfig
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.encoders import Encoder, EncodersConfig
from mllm_jax.models.mllm import ModelConfig

Params = dict[str, Any]

OTHER_PARTS = "belongs to another part of the checkpoint"
CONNECTOR_NAMES = (
    r"(model\.)?(multi_modal_projector|mm_projector|image_newline|abstractor|vision_resampler"
    r"|vlm_uni_(query|aux|val)_projector)(\..*)?"
)
TOWER_NAMES = r"(model\.)?(vision_tower|vision_tower_aux|vision_model)\..*"
LLM_NAMES = r"(model\.)?language_model\..*|lm_head\..*|model\.(embed_tokens|layers|norm|final_layernorm)\..*"
# OpenCLIP's text encoder, alone or behind `text.`, and its projection of image features.
OPENCLIP_TEXT = (
    r"(text\.)?(transformer|token_embedding|ln_final)\..*|(text\.)?(positional_embedding|text_projection)"
    r"|visual\.head\..*"
)
VISION_NEIGHBOURS = (
    (r"text_model\..*", OTHER_PARTS),
    (r"(visual_projection|text_projection)\..*|logit_scale|logit_bias", OTHER_PARTS),
    (OPENCLIP_TEXT, OTHER_PARTS),
    (LLM_NAMES, OTHER_PARTS),
    (CONNECTOR_NAMES, OTHER_PARTS),
)
LLM_NEIGHBOURS = ((TOWER_NAMES, OTHER_PARTS), (CONNECTOR_NAMES, OTHER_PARTS))
CONNECTOR_NEIGHBOURS = (
    (TOWER_NAMES, OTHER_PARTS),
    (LLM_NAMES, OTHER_PARTS),
    (r"(model\.)?image_newline", "only images cut into tiles use it"),
)


def _read_config(path: str | pathlib.Path, part: str) -> tuple[Any, Family]:
    table, shipped = (families.VISION, "mini_vit") if part == "vision_config" else (families.LLMS, "mini_llm")
    fields, file = read_config(resolve_path(path, shipped))
    return part_config(fields, part, table, str(file))


def fused_paths(path: str | pathlib.Path) -> list[str]:
    """The checkpoints of fused towers, "A+B"; [] for a single one."""
    parts = str(path).split("+")
    return [] if len(parts) == 1 or pathlib.Path(path).expanduser().is_dir() else parts


def vision_config(path: str | pathlib.Path) -> Encoder | EncodersConfig:
    """The tower of a checkpoint: its own config.json or a composite's `vision_config`, and its normalisation.

    Args:
      path: "mini", a directory or a hub id; several joined by "+" are encoders side by side on channels.

    Raises:
      FileNotFoundError: no such checkpoint.  ValueError: a family that is not supported.
    """
    if several := fused_paths(path):
        return EncodersConfig(tuple(vision_config(each) for each in several))
    if fields := shipped_config(path, "vision"):
        return part_config(fields, "vision_config", families.VISION, str(path))[0]
    directory = resolve_path(path, "mini_vit")
    if native.is_native(directory):
        return native.load_config(directory).vision
    return with_normalisation(_read_config(path, "vision_config")[0], path)


def llm_config(path: str | pathlib.Path) -> DecoderConfig:
    """The decoder of a checkpoint: its own config.json or a composite's `text_config`.

    Raises:
      FileNotFoundError: no such checkpoint.  ValueError: a family that is not supported.
    """
    if fields := shipped_config(path, "llms"):
        return part_config(fields, "text_config", families.LLMS, str(path))[0]
    directory = resolve_path(path, "mini_llm")
    if native.is_native(directory):
        return native.load_config(directory).llm
    return _read_config(path, "text_config")[0]


def _read(source: Source, part: Part, neighbours: tuple, dtype: Any) -> tuple[Params, Report]:
    placements, shapes, report = plan_parts(source, [part], neighbours)
    check_tied(source, report)
    return read_tree(source, placements, shapes, dtype), report


def log_report(path: Any, report: Report) -> None:
    """Logs what became of the tensors of a checkpoint."""
    logging.info("%s: %d tensors read, %d ignored", path, len(report.used), len(report.ignored))
    for name, why in report.ignored.items():
        logging.debug("ignored %s: %s", name, why)


def load_vision(
    path: str | pathlib.Path,
    depth: int | None = None,
    dtype: Any = None,
    whole: Encoder | EncodersConfig | None = None,
) -> Params:
    """Parameters of a vision tower: `read_vision`, whose report is logged."""
    params, report = read_vision(path, depth, dtype, whole)
    log_report(path, report)
    return params


def read_vision(
    path: str | pathlib.Path,
    depth: int | None = None,
    dtype: Any = None,
    whole: Encoder | EncodersConfig | None = None,
) -> tuple[Params, Report]:
    """A vision tower as nested dicts of NumPy arrays, blocks stacked on axis 0, and what became of its tensors.

    Args:
      path: "mini", a directory or a hub id; several joined by "+" are encoders that are used together.
      depth: blocks wanted (the deepest hidden state used); all by default. Deeper ones are not read.
      dtype: of the result; None keeps the checkpoint's.
      whole: how several are used together, where that is not side by side on channels.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    if several := fused_paths(path):
        whole = whole or vision_config(path)
        depths = [depth if depth is None else whole.tower_layer(i, depth) for i in range(len(several))]
        pairs = enumerate(zip(several, depths, strict=True))
        found = {f"tower_{i}": read_vision(each, d, dtype) for i, (each, d) in pairs}
        reports = (report for _, report in found.values())
        return {name: tower for name, (tower, _) in found.items()}, sum(reports, Report((), {}))
    directory = resolve_path(path, "mini_vit")
    if native.is_native(directory):
        return _shortened(native.load_config(directory), directory, depth, dtype), Report(("params",), {})
    config, family = _read_config(path, "vision_config")
    if depth is not None and not 0 <= depth <= config.depth:
        raise ValueError(f"{path}: {depth} blocks asked for, the tower has {config.depth}")
    return _read(Source(directory), vision_part(config, family, depth), VISION_NEIGHBOURS, dtype)


def load_llm(path: str | pathlib.Path, dtype: Any = None) -> Params:
    """Parameters of an LLM: `read_llm`, whose report is logged."""
    params, report = read_llm(path, dtype)
    log_report(path, report)
    return params


def read_llm(path: str | pathlib.Path, dtype: Any = None) -> tuple[Params, Report]:
    """Parameters of an LLM as nested dicts of NumPy arrays, blocks stacked on axis 0, and what became of its tensors.

    Args:
      path: "mini", a directory or a hub id.
      dtype: of the result; None keeps the checkpoint's.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    directory = resolve_path(path, "mini_llm")
    if native.is_native(directory):
        return _own(native.load_config(directory), directory, "llm", dtype), Report(("params",), {})
    config, family = _read_config(path, "text_config")
    return _read(Source(directory), llm_part(config, family), LLM_NEIGHBOURS, dtype)


def _own(model: ModelConfig, directory: pathlib.Path, part: str, dtype: Any) -> Params:
    """A part of a model directory of ours, with adapters that were kept apart merged into it."""
    params = native.load_params(directory, part, dtype=dtype)
    if model.lora is None or not lora.split(params)[1]:
        return params
    return jax.device_get(lora.merge({part: params}, model.lora)[part])


def check_llm(path: str | pathlib.Path) -> None:
    """Checks from the headers alone that `load_llm` would find every tensor.

    Raises:
      FileNotFoundError, ValueError: as `load_llm`.
    """
    directory = resolve_path(path, "mini_llm")
    if not native.is_native(directory):
        config, family = _read_config(path, "text_config")
        plan_parts(Source(directory), [llm_part(config, family)], LLM_NEIGHBOURS)


def check_vision(
    path: str | pathlib.Path, depth: int | None = None, whole: Encoder | EncodersConfig | None = None
) -> None:
    """Checks from the headers alone that `load_vision` would find every tensor; arguments as there.

    Raises:
      FileNotFoundError, ValueError: as `load_vision`.
    """
    if several := fused_paths(path):
        whole = whole or vision_config(path)
        for i, each in enumerate(several):
            check_vision(each, None if depth is None else whole.tower_layer(i, depth))
        return
    directory = resolve_path(path, "mini_vit")
    if not native.is_native(directory):
        config, family = _read_config(path, "vision_config")
        plan_parts(Source(directory), [vision_part(config, family, depth)], VISION_NEIGHBOURS)


def _shortened(model: ModelConfig, directory: pathlib.Path, depth: int | None, dtype: Any) -> Params:
    config, params = model.vision, _own(model, directory, "vision", dtype)
    if not isinstance(config, EncodersConfig):
        return _truncated(config, params, depth, directory)
    depths = [None if depth is None else config.tower_layer(i, depth) for i in range(len(config.towers))]
    return {
        f"tower_{i}": _truncated(tower, params[f"tower_{i}"], d, directory)
        for i, (tower, d) in enumerate(zip(config.towers, depths, strict=True))
    }


def _truncated(config: Encoder, params: Params, depth: int | None, path: Any) -> Params:
    if isinstance(config, ConvNextConfig):  # all of whose blocks its one feature needs
        return params
    held = blocks_of(params)
    if depth is None or depth == held:
        return params
    if not 0 <= depth < held:
        raise ValueError(f"{path}: {depth} blocks asked for, the stored tower has {held}")
    blocks = jax.tree.map(lambda x: x[:depth], params["blocks"])
    return {**params, "blocks": blocks} if depth else {k: v for k, v in params.items() if k != "blocks"}


def blocks_of(params: Params) -> int:
    """Blocks that a tower's parameters hold."""
    leaves = jax.tree.leaves(params.get("blocks", {}))
    return leaves[0].shape[0] if leaves else 0


def with_fillers(family: Family, config: Any, tensors: list, prefix: str = "") -> list:
    """Adds the tensors that the transformers class wants and we do not have, in the first tensor's dtype."""
    dtype = tensors[0][1]
    return tensors + [
        (prefix + name, dtype, shape, lambda s=shape, v=value: np.full(s, v, dtype))
        for name, shape, value in family.fillers(config)
    ]


def _write(
    directory: pathlib.Path, family: Family, config: Any, params: Params, dtype: Any, **extras: Any
) -> None:
    native.refuse_existing(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = with_fillers(family, config, write_plan(params, family.rules(config), dtype))
    fields = {**family.write(config), "torch_dtype": str(tensors[0][1]), **extras}
    files.write_json(directory / "config.json", fields, indent=2)
    write_sharded(directory, tensors)


def save_vision(
    directory: str | pathlib.Path,
    config: Encoder | EncodersConfig,
    params: Params,
    dtype: Any = None,
    processor: Mapping[str, Any] | None = None,
) -> None:
    """Writes a tower that transformers' `from_pretrained` loads.

    The class is that of the first family that can express the config: CLIPVisionModel, SiglipVisionModel (without
    pooling head), Siglip2VisionModel, Dinov2Model, Dinov2WithRegistersModel, whose final norm, which we neither have
    nor use, is written as the identity; a ConvNeXt is written as timm reads it. A tower shorter than `config.depth`
    (truncated at the deepest hidden state used) is written with the blocks it has. Several towers are written one by
    one, as `tower_0`, `tower_1`, ...; "DIRECTORY/tower_0+DIRECTORY/tower_1" names them together.

    Args:
      dtype: to store; None keeps the parameters'.
      processor: its image processor, as in `native.processor_json`; of fused towers the first one's.

    Raises:
      ValueError: no family can express the config.
      FileExistsError: the directory holds files already.
    """
    directory = pathlib.Path(directory)
    if isinstance(config, EncodersConfig):
        for i, tower in enumerate(config.towers):
            own = None if i else processor
            save_vision(directory / f"tower_{i}", tower, params[f"tower_{i}"], dtype, own)
        return
    config = config.with_depth(blocks_of(params))
    fields = native.processor_json(config, config.image_size, processor)
    _write(directory, families.for_config(families.VISION, config), config, params, dtype)
    files.write_json(directory / "preprocessor_config.json", fields, indent=2)


def save_llm(
    directory: str | pathlib.Path,
    config: DecoderConfig,
    params: Params,
    tokenizer: Any = None,
    dtype: Any = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Writes an LLM that transformers' `from_pretrained` loads, with its tokenizer if given.

    Args:
      dtype: to store; None keeps the parameters'.
      generation: contents of generation_config.json (`special_tokens.generation`); None: the tokenizer's ids.

    Raises:
      ValueError: no family can express the config.
      FileExistsError: the directory holds files already.
    """
    directory = pathlib.Path(directory)
    generation = special_tokens.generation(None, tokenizer) if generation is None else generation
    family, ids = families.for_config(families.LLMS, config), special_tokens.for_config(generation)
    _write(directory, family, config, params, dtype, **ids)
    special_tokens.write(directory, generation)
    if tokenizer is not None:
        special_tokens.save_tokenizer(directory, tokenizer)
