"""Whole models: read from any supported layout into final arrays, written to Hugging Face's LLaVA layout."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import files
from mllm_jax.bucket_copy import local_copy
from mllm_jax.interop import families, native, recorded, special_tokens, tile_fields
from mllm_jax.interop.assemble import Placement, Report, Shape, read_tree, write_plan
from mllm_jax.interop.composite import EXTENSION, Composite, read_composite
from mllm_jax.interop.connector_names import SPELLINGS, connector_part, connector_shapes, separators_part
from mllm_jax.interop.hub import resolve_path
from mllm_jax.interop.parts import Part, check_tied, llm_part, plan_parts, vision_parts
from mllm_jax.interop.peft import add_adapter, load_adapter, merge_adapter
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.interop.sinks import read_to_devices
from mllm_jax.interop.source import Source
from mllm_jax.interop.towers import (
    CONNECTOR_NEIGHBOURS,
    VISION_NEIGHBOURS,
    blocks_of,
    llm_config,
    load_llm,
    log_report,
    with_fillers,
)
from mllm_jax.models import lora
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.models.paths import flatten, unflatten
from mllm_jax.models.positions import resize_position_table
from mllm_jax.models.vit import VisionConfig
from mllm_jax.storage import BUCKET, Path, as_path

CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load_model(
    path: str | pathlib.Path,
    tower: str | None = None,
    shardings_for: Callable[[ModelConfig], ShardingOf] | None = None,
    dtype: Any = None,
) -> tuple[ModelConfig, Params, Report]:
    """A multimodal model from a directory of ours or a checkpoint in the llava-hf, llava or honeybee layout.

    Args:
      path: a directory or a hub id.
      tower: vision tower of a llava checkpoint, instead of the one that its config names; Mini-Gemini's two as A+B.
      shardings_for: model -> (path, shape) -> sharding; tensors go one at a time to the devices. None: NumPy arrays.
      dtype: of the result; None keeps the checkpoint's.

    Returns:
      The computation, the parameters, and what became of every tensor.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    directory = resolve_path(path)
    if native.is_native(directory):
        if tower:
            raise ValueError(
                f"{directory} holds its own vision tower, so none can be named; leave out {tower!r}"
            )
        model = native.load_config(directory)
        params = native.load_params(directory, None, shardings_for and shardings_for(model), dtype)
        return model, params, Report(("params",), {})
    composite, planned = plan_model(path, tower)
    sharding_of = shardings_for and shardings_for(composite.model)
    params: Params = {}
    report = Report((), {})
    for source, placements, shapes, told in planned:
        check_tied(source, told)
        params = _merged(params, _place(source, placements, shapes, sharding_of, dtype))
        report += told
    if composite.vocab != composite.model.llm.vocab:
        params["llm"] = _cut_vocabulary(params["llm"], composite.model.llm.vocab)
    return composite.model, params, report


Planned = tuple[Source, list[Placement], dict[str, Shape], Report]


def plan_model(path: str | pathlib.Path, tower: str | None = None) -> tuple[Composite, list[Planned]]:
    """What a multimodal checkpoint is, and where each of its tensors goes; nothing is read yet.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    composite = read_composite(path, tower)
    model, source = composite.model, Source(resolve_path(path))
    depth = model.make_connector().request().deepest
    towers = vision_parts(model, composite.vision, depth)
    llm = llm_part(dataclasses.replace(model.llm, vocab=composite.vocab), composite.llm, "llm")
    parts = [connector_part(model, composite.layout), llm]
    beside = {i for i, part in enumerate(towers) if composite.towers and not part.found(source)}
    if tower and len(beside) < len(towers):
        raise ValueError(
            f"{source.directory} holds its own vision tower, so none can be named; leave out {tower!r}"
        )
    parts += [part for i, part in enumerate(towers) if i not in beside]
    neighbours = ((r"(model\.)?image_newline", "only images cut into tiles use it"),)
    if model.visual_layout.separated:
        parts, neighbours = [*parts, separators_part(model)], ()
    planned = [(source, *plan_parts(source, parts, neighbours))]
    planned += [_plan_tower(composite.towers[i], towers[i]) for i in sorted(beside)]
    return composite, planned


def _plan_tower(path: str, vision: Part) -> Planned:
    there = Source(resolve_path(path, "mini_vit"))
    return (there, *plan_parts(there, [vision], VISION_NEIGHBOURS))


def merged_llm(
    adapter: str | pathlib.Path, base: str, dtype: Any = None
) -> tuple[DecoderConfig, Params, Report]:
    """An LLM with a PEFT adapter merged into it.

    Raises:
      ValueError: the adapter does not fit, or `base` is not given.
    """
    _need_base(adapter, base)
    config = llm_config(base)
    llm, report = _merge(adapter, config, load_llm(base, dtype=dtype))
    return config, llm, report


def merged_model(
    adapter: str | pathlib.Path, base: str, tower: str | None = None, dtype: Any = None
) -> tuple[ModelConfig, Params, Report]:
    """A multimodal model with a PEFT adapter of any of its parts merged into it; `base` as in `load_model`.

    Raises:
      ValueError: the adapter does not fit, or `base` is not given.
    """
    _need_base(adapter, base)
    model, params, report = load_model(base, tower, dtype=dtype)
    params, told = merge_adapter(adapter, model, params)
    return model, params, report + told


def _need_base(adapter: str | pathlib.Path, base: str) -> None:
    if not base:
        raise ValueError(f"{adapter}: which LLM does this adapter belong to? Give --base")


def _merge(adapter: str | pathlib.Path, config: DecoderConfig, llm: Params) -> tuple[Params, Report]:
    settings, adapters, report = load_adapter(adapter, config)
    return jax.device_get(lora.merge({"llm": add_adapter(llm, adapters)}, settings)["llm"]), report


def load_llava_lora(
    directory: pathlib.Path, base: str, tower: str | None = None, dtype: Any = None
) -> tuple[ModelConfig, Params, Report]:
    """LLaVA trained with LoRA: adapter, connector in non_lora_trainables.bin, base LLM and tower elsewhere; merged.

    Raises:
      FileNotFoundError, ValueError: a file or a tensor that is missing or does not fit.
    """
    composite = read_composite(directory, tower)
    model = composite.model
    _, llm, report = merged_llm(directory, base, dtype)
    if llm["embedding"].shape[0] != model.llm.vocab:
        raise ValueError(
            f"{directory}: its config.json has a vocabulary of {model.llm.vocab}, the base {base} of "
            f"{llm['embedding'].shape[0]}"
        )
    file = directory / "non_lora_trainables.bin"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: it holds the connector of a LLaVA LoRA checkpoint")
    source = Source(directory, [file])
    parts = [connector_part(model, "llava")]
    if model.visual_layout.separated:
        parts.append(separators_part(model))
    placements, shapes, told = plan_parts(source, parts)
    params = {"llm": llm, **_place(source, placements, shapes, None, dtype)}
    depth = model.make_connector().request().deepest
    report += told
    for path, part in zip(composite.towers, vision_parts(model, composite.vision, depth), strict=True):
        *planned, told = _plan_tower(path, part)
        params = _merged(params, _place(*planned, None, dtype))
        report += told
    return model, params, report


def _merged(params: Params, more: Params) -> Params:
    """Two trees that set different leaves: the encoders lie side by side below `vision`."""
    return unflatten(flatten(params) | flatten(more))


def _with_description(path: Path) -> pathlib.Path:
    """The copy of a checkpoint, or a weight file, in a bucket; with a file also what says of which model it is."""
    copy = local_copy(path)
    if copy.is_file():
        for description in path.parent.glob("*.json"):
            local_copy(description)
    return copy


def load_connector(
    path: str | pathlib.Path,
    model: ModelConfig,
    dtype: Any = None,
    allow_mismatch: bool = False,
    template: str | None = None,
) -> Params:
    """A connector alone: LLaVA's stage-1 `mm_projector.bin`, or that of any checkpoint with the same connector.

    Args:
      path: a weight file, or a checkpoint's directory (ours too) or hub id.
      allow_mismatch: take it although the checkpoint says that it was trained in another model (`recorded`).
      template: the conversation template in use, where it is to be compared too.

    Raises:
      ValueError: no layout in which this connector is published is there, a tensor that does not fit, or a checkpoint
        whose own description differs from `model`; both values are named.
    """
    path = (
        _with_description(as_path(path)) if str(path).startswith(BUCKET) else pathlib.Path(path).expanduser()
    )
    directory = path.parent if path.is_file() else resolve_path(path)
    if not allow_mismatch:
        recorded.check(directory, model, template)
    if not path.is_file() and native.is_native(directory):
        return _own_connector(directory, model, dtype)
    source = Source(directory, [path] if path.is_file() else None)
    tried = []
    for layout in SPELLINGS:
        try:
            part = connector_part(model, layout)
        except ValueError as error:  # published elsewhere
            tried.append(str(error))
            continue
        if part.found(source):
            placements, shapes, report = plan_parts(source, [part], CONNECTOR_NEIGHBOURS)
            log_report(path, report)
            return _place(source, placements, shapes, None, dtype)["connector"]
        tried.append(f"{part.what} is not there ({part.rules[0].name!r})")
    raise ValueError(f"{path} holds no connector {model.connector!r}: {'; '.join(tried)}")


def save_connector(
    directory: str | pathlib.Path,
    model: ModelConfig,
    params: Params,
    dtype: Any = None,
    **extras: str | int | None,
) -> str:
    """Writes a connector alone, as `load_connector` reads it, in the first published layout that has names for it.

    config.json holds our own description of the model that it was trained in.

    Args:
      params: the connector's.
      dtype: to store; None keeps the parameters'.
      extras: as in `native.model_to_json`.

    Returns:
      The layout; "mllm_jax" where none is published.

    Raises:
      FileExistsError: the directory holds files already.
    """
    directory = pathlib.Path(directory)
    native.refuse_existing(directory)
    for layout in SPELLINGS:
        with contextlib.suppress(ValueError):
            part = connector_part(model, layout)
            break
    prefixes = [(ours, theirs) for theirs, ours in part.spellings[0]]
    present = [rule for rule in part.rules if rule.path in part.shapes]
    tensors = write_plan(params, present, dtype, prefixes)
    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / "config.json", {EXTENSION: native.model_to_json(model, **extras)})
    write_sharded(directory, tensors)
    return layout


def _own_connector(directory: pathlib.Path, model: ModelConfig, dtype: Any) -> Params:
    held, wanted = connector_shapes(native.load_config(directory)), connector_shapes(model)
    if different := sorted(held.items() ^ wanted.items()):
        path, _ = different[0]
        raise ValueError(
            f"{directory} holds connector parameter {path!r} as {held.get(path)}, connector {model.connector!r} needs "
            f"{wanted.get(path)}"
        )
    return native.load_params(directory, "connector", dtype=dtype)


def _place(
    source: Source,
    placements: list[Placement],
    shapes: dict[str, Shape],
    sharding_of: ShardingOf | None,
    dtype: Any,
) -> Params:
    if sharding_of is None:
        return read_tree(source, placements, shapes, dtype)
    return read_to_devices(source, placements, shapes, sharding_of, dtype)


def _cut_vocabulary(llm: Params, vocab: int) -> Params:
    """Without the rows that an export added behind the vocabulary."""
    llm = {**llm, "embedding": llm["embedding"][:vocab]}
    for name in ("head", "head_bias"):
        if name in llm:
            llm[name] = llm[name][..., :vocab]
    return llm


def _grown_vocabulary(llm: Params, vocab: int) -> Params:
    """With zero rows behind the vocabulary."""
    extra = vocab - llm["embedding"].shape[0]
    llm = {**llm, "embedding": np.pad(np.asarray(llm["embedding"]), ((0, extra), (0, 0)))}
    for name in ("head", "head_bias"):
        if name in llm:
            value = np.asarray(llm[name])
            llm[name] = np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, extra)])
    return llm


def at_native_size(model: ModelConfig, vision: Params) -> tuple[ModelConfig, Params]:
    """The same computation with the position table resized once and for all to the model's resolution."""
    config = model.vision
    grid, native_grid = config.grid(model.image_size), config.grid(config.image_size)
    if grid != native_grid:
        prefix = int(config.class_token)
        table = np.asarray(vision["pos_embed"])
        patches = resize_position_table(jnp.asarray(table[prefix:]), native_grid, grid, config.interpolation)
        patches = np.asarray(patches).astype(table.dtype)
        vision = {**vision, "pos_embed": np.concatenate([table[:prefix], patches])}
    config = dataclasses.replace(config, image_size=model.image_size)
    return dataclasses.replace(model, vision=config), vision


def _feature_layers(model: ModelConfig, depth: int) -> int | list[int]:
    """`vision_feature_layer` of a tower cut to `depth` blocks."""
    connector = model.make_connector()
    if model.connector == "sci":
        return [layer - depth - 1 for layer in connector.channel_layers()]
    return model.vision_spec.select_layer - depth - 1


def save_llava_hf(
    directory: str | pathlib.Path,
    model: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    dtype: Any = None,
    generation: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    **extras: str | int | None,
) -> None:
    """Writes a model that transformers' LlavaForConditionalGeneration loads, with the same logits.

    Of images in tiles, LlavaNextForConditionalGeneration, or LlavaOnevision's where their features are shrunk.

    The tower has the blocks that are used; its position table is resized if the model's resolution is not the tower's.
    The image token is the one that the model came with (`image_token_index`), or the tokenizer's `<image>`; where there
    is neither it is added behind the vocabulary. config.json also holds our own description (`mllm_jax`), so that
    reading it back gives the same model and the same parameters bit for bit.

    Args:
      tokenizer: saved beside the weights.
      dtype: to store; None keeps the parameters'.
      generation: contents of generation_config.json (`special_tokens.generation`); None: the tokenizer's ids.
      processor: the tower's, as in `native.processor_json`.
      extras: as in `native.model_to_json`.

    Raises:
      ValueError: the connector cannot be expressed (mlp2x_gelu and plain sci can), or the tower or LLM, or the
        tokenizer has another `<image>` than the model.
      FileExistsError: the directory holds files already.
    """
    directory = pathlib.Path(directory)
    _check_expressible(model)
    native.refuse_existing(directory)
    kind, tile_entries = tile_fields.write_hf(model.tiles, model.image_size)
    processor = native.processor_json(model.vision, model.image_size, processor)
    model, vision = at_native_size(model, params["vision"])
    depth = blocks_of(vision)
    tower = dataclasses.replace(model.vision, depth=depth)
    vision_family = families.for_config(families.VISION, tower)
    token = _image_token(tokenizer, model.llm.vocab, extras.get("image_token_index"))
    generation = special_tokens.generation(None, tokenizer) if generation is None else generation
    vocab = max(model.llm.vocab, token + 1)
    llm_params = params["llm"] if vocab == model.llm.vocab else _grown_vocabulary(params["llm"], vocab)
    llm_config = dataclasses.replace(model.llm, vocab=vocab)
    llm_family = families.for_config(families.LLMS, llm_config)
    prefix = (
        "vision_tower." if vision_family.model_type.startswith("dinov2") else "vision_tower.vision_model."
    )
    tensors = [
        *with_fillers(
            vision_family,
            tower,
            write_plan(vision, vision_family.rules(tower), dtype, (("", prefix),)),
            prefix,
        ),
        *write_plan(
            params["connector"],
            connector_part(model, "llava-hf").rules,
            dtype,
            (("", "multi_modal_projector."),),
        ),
        *write_plan(llm_params, llm_family.rules(llm_config), dtype, (("", "language_model."),)),
    ]
    if "separators" in params:
        tensors = [*write_plan(params["separators"], separators_part(model).rules, dtype), *tensors]
    if model.tiles:
        processor |= {
            "image_processor_type": f"{CLASSES[kind]}ImageProcessor",
            "image_grid_pinpoints": tile_entries["image_grid_pinpoints"],
            "do_pad": True,
        }
    fields = {
        "model_type": kind,
        "architectures": [f"{CLASSES[kind]}ForConditionalGeneration"],
        **tile_entries,
        "vision_config": vision_family.write(tower),
        "text_config": llm_family.write(llm_config) | special_tokens.for_config(generation),
        "image_token_index": token,
        "image_seq_length": model.visual_layout.slot.num_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": _feature_layers(model, depth),
        "vision_feature_select_strategy": "default" if tower.class_token else "full",
        "tie_word_embeddings": model.llm.tied,
        "torch_dtype": str(tensors[-1][1]),
        EXTENSION: native.model_to_json(model, **{**extras, "image_token_index": None}),
        **special_tokens.for_config(generation),
    }
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        special_tokens.save_tokenizer(directory, tokenizer)
    special_tokens.write(directory, generation)
    files.write_json(directory / "preprocessor_config.json", processor, indent=2)
    files.write_json(
        directory / "processor_config.json",
        {
            "processor_class": f"{CLASSES[kind]}Processor",
            "image_token": "<image>",
            "vision_feature_select_strategy": fields["vision_feature_select_strategy"],
            **_counting(kind, model, tower),
        },
    )
    files.write_json(directory / "config.json", fields)
    write_sharded(directory, tensors)


def _counting(kind: str, model: ModelConfig, tower: VisionConfig) -> dict[str, Any]:
    """How a processor of transformers counts visual tokens."""
    if kind == "llava_onevision":
        return {
            "num_image_tokens": model.visual_layout.slot.num_tokens,
            "vision_aspect_ratio": f"anyres_max_{model.tiles.max_tiles}",
        }
    return {"patch_size": tower.patch, "num_additional_image_tokens": tower.prefix}


def _check_expressible(model: ModelConfig) -> None:
    if isinstance(model.vision, EncodersConfig):
        raise ValueError(
            "transformers' LLaVA has one vision tower; export plain safetensors or Orbax instead"
        )
    if not isinstance(model.vision, VisionConfig):
        raise ValueError(
            f"transformers' LLaVA has no class for the vision tower {model.vision.title}; export plain safetensors or "
            "Orbax instead"
        )
    if model.max_patches:
        raise ValueError(
            "transformers' LLaVA sees square images only, not ones at their own aspect ratio (vision.max_patches); "
            "export plain safetensors or Orbax instead"
        )
    if model.visual_layout.separated and not model.image_layout.separated:
        raise ValueError(
            "transformers' LLaVA has no newline of videos (video.newline); export plain safetensors or Orbax instead"
        )
    if model.llm.head_bias or model.llm.logit_softcap is not None:
        what = "bias of its output head" if model.llm.head_bias else "soft cap on its logits"
        raise ValueError(
            f"transformers' LLaVA would leave out the LLM's {what}; export plain safetensors or Orbax instead"
        )
    options = {key: value for key, value in model.connector_options if value}
    plain = (
        options.get("reduction", 1) == 1 and not options.get("reduced_grid") and not options.get("learnable")
    )
    if model.connector not in ("mlp2x_gelu", "sci") or not plain:
        raise ValueError(
            f"transformers' LLaVA cannot compute connector {model.connector!r} with options {options}; it has "
            "mlp2x_gelu and plain sci. Export plain safetensors or Orbax instead."
        )
    if model.vision.registers:
        raise ValueError("transformers' LLaVA would keep the register tokens of this tower as patches")


def _image_token(tokenizer: Any, vocab: int, recorded: str | int | None) -> int:
    held = None if tokenizer is None else tokenizer.get_vocab().get("<image>")
    if recorded is not None and held not in (None, recorded):
        raise ValueError(
            f"the model's image_token_index is {recorded}, but <image> is {held} in its tokenizer; use the tokenizer "
            "that the model came with"
        )
    if recorded is None and held is None:
        if tokenizer is None:
            return vocab
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        return tokenizer.convert_tokens_to_ids("<image>")
    return int(held if recorded is None else recorded)


def describe(composite: Composite) -> str:
    """One line: what a checkpoint is."""
    model = composite.model
    return (
        f"{composite.layout} ({' + '.join(family.model_type for family in composite.vision)}, {model.connector}, "
        f"{composite.llm.model_type})"
    )
