"""Whole multimodal checkpoints: what they are, read from their config.json.

Layouts: `llava-hf` (transformers' Llava-, LlavaNext- and LlavaOnevisionForConditionalGeneration), `llava`
(haotian-liu/LLaVA and what descends from it, such as Dense Connector; the vision tower is usually beside it),
`honeybee`.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from mllm_jax.interop import families, honeybee_fields, native, tile_fields, video_fields
from mllm_jax.interop.families import convnext
from mllm_jax.interop.families.base import Family
from mllm_jax.interop.hub import OPENCLIP_CONFIG, load_processor_config, named_by, read_json, resolve_path
from mllm_jax.interop.llava_fields import check_fields, connector_of, encoders_of, select_layer_of
from mllm_jax.interop.source import Source
from mllm_jax.models.encoders import Encoder, EncodersConfig
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

EXTENSION = "mllm_jax"  # our own entry in an exported config.json
# Types of the parts in composites that do not name them, and of LLaVA's own classes.
PART_TYPES = {
    ("clip", "vision_config"): "clip_vision_model",
    ("siglip", "vision_config"): "siglip_vision_model",
    ("siglip2", "vision_config"): "siglip2_vision_model",
    ("llava", "vision_config"): "clip_vision_model",
    ("llava", "text_config"): "llama",
    ("llava_next", "vision_config"): "clip_vision_model",
    ("llava_next", "text_config"): "llama",
    ("llava_onevision", "vision_config"): "siglip_vision_model",
    ("llava_onevision", "text_config"): "qwen2",
    ("mllm", "vision_config"): "clip_vision_model",
    ("mllm", "text_config"): "llama",
}
# What a config of transformers' LLaVA classes may say besides what is read, with the values that are computed here.
_LLAVA_HF: dict[str, tuple[Any, ...]] = {
    "multimodal_projector_bias": (True,),
    "projector_hidden_act": ("gelu",),
    "quantization_config": (None, {}),
    "spatial_merge_size": (None, 1),
}
_NO_RATIO: dict[str, tuple[Any, ...]] = {"vision_aspect_ratio": (None,)}
LLAVA_HF: dict[str, dict[str, tuple[Any, ...]]] = {
    "llava": {
        **_LLAVA_HF,
        **_NO_RATIO,
        "image_grid_pinpoints": (None,),
        "use_image_newline_parameter": (None, False),
    },
    "llava_next": {**_LLAVA_HF, **_NO_RATIO, "use_image_newline_parameter": (None, True)},
    "llava_onevision": {**_LLAVA_HF, "use_image_newline_parameter": (None, True)},
}
LLAVA_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_phi": "phi",
    "llava_gemma2": "gemma2",
    "mgm": "llama",
    "mini_gemini": "llama",
    "mobilevlm": "llama",
}
# Of a config.json whose model_type is just "llava", the class says which LLM it has: LlavaQwenForCausalLM.
_LLAVA_CLASSES = {"Llama": "llama", "Mistral": "mistral", "Qwen": "qwen2", "Phi": "phi", "Gemma2": "gemma2"}
# transformers' LLaVA-NeXT-Video, for whose refusal there is a reason.
_POOLS_BEFORE = "llava_next_video"


@dataclasses.dataclass(frozen=True)
class Composite:
    """A multimodal checkpoint as its config.json describes it.

    Attributes:
      layout: "llava-hf", "llava" or "honeybee".
      model: the computation.
      vision: the families of the vision towers.
      llm: the family of the LLM.
      towers: where the vision towers are, when the checkpoint does not hold them; () = it does.
      vocab: rows of the stored embedding; more than the model's when an export added an image token.
    """

    layout: str
    model: ModelConfig
    vision: tuple[Family, ...]
    llm: Family
    towers: tuple[str, ...]
    vocab: int


def part_config(
    fields: Mapping[str, Any], part: str, table: Mapping[str, Family], where: str
) -> tuple[Any, Family]:
    """Our config and the family of `vision_config` or `text_config`, or of a config.json of the part alone.

    Raises:
      ValueError: a model_type that is not supported.
    """
    outer = fields.get("model_type")
    if not isinstance(outer, str | None):
        raise ValueError(f"{where}: model_type={outer!r} must be a name")
    if outer not in table and isinstance(fields.get(part), dict):
        fields = dict(fields[part])
        fields["model_type"] = fields.get("model_type") or PART_TYPES.get((outer, part))
        if fields["model_type"] in ("clip", "siglip", "siglip2"):  # some composites name the whole
            fields["model_type"] = PART_TYPES[fields["model_type"], part]
    elif part == "text_config" and outer in LLAVA_TYPES:
        fields = {**fields, "model_type": _llm_type(fields, where)}
    family = families.for_type(table, fields.get("model_type"), where)
    try:
        return family.config(fields), family
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _llm_type(fields: Mapping[str, Any], where: str) -> str:
    """The model_type of the LLM in LLaVA's own layout."""
    named = fields.get("architectures")
    found = (
        re.fullmatch(r"Llava(\w+)ForCausalLM", str(named[0])) if isinstance(named, list) and named else None
    )
    if fields["model_type"] != "llava" or found is None:
        return LLAVA_TYPES[fields["model_type"]]
    if found[1] not in _LLAVA_CLASSES:
        raise ValueError(f"{where}: architectures={named!r} is not supported: an LLM of type {found[1]}")
    return _LLAVA_CLASSES[found[1]]


def read_config(directory: pathlib.Path) -> tuple[dict[str, Any], pathlib.Path]:
    """The description of a checkpoint, and its file: config.json, or OpenCLIP's where there is none for transformers.

    Raises:
      FileNotFoundError, ValueError: as `read_json`.
    """
    file, other = directory / "config.json", directory / OPENCLIP_CONFIG
    if other.is_file() and not (file.is_file() and "model_type" in read_json(file)):
        file = other
    return convnext.described(read_json(file)), file


def with_normalisation(config: Encoder, path: str | pathlib.Path) -> Encoder:
    """The tower with the mean and std of the checkpoint's image processor, if it says them."""
    processor = load_processor_config(path)
    return _normalised(config, processor, path) if "image_mean" in processor else config


def _normalised(config: Encoder, processor: Mapping[str, Any], path: object) -> Encoder:
    mean, std = (_three(processor, key, path) for key in ("image_mean", "image_std"))
    if not all(std):
        raise ValueError(f"{path}: the image processor's image_std={list(std)} must not be zero")
    return dataclasses.replace(config, mean=mean, std=std)


def _three(processor: Mapping[str, Any], key: str, path: object) -> tuple[float, ...]:
    values = processor.get(key)
    if (
        not isinstance(values, list)
        or [type(v) in (int, float) and abs(v) < 1e6 for v in values] != [True] * 3
    ):
        raise ValueError(f"{path}: the image processor's {key}={values!r} must be three numbers")
    return tuple(float(value) for value in values)


def is_composite(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of a multimodal checkpoint."""
    return (
        "mm_vision_tower" in fields
        or _is_honeybee(fields)
        or fields.get("model_type") in (*LLAVA_HF, *LLAVA_TYPES, _POOLS_BEFORE)
    )


def _is_honeybee(fields: Mapping[str, Any]) -> bool:
    """Its first checkpoints say model_type "mllm", later ones nothing."""
    return (
        fields.get("model_type") == "mllm"
        or {"lm_config", "projector_config", "text_config"} <= fields.keys()
    )


def is_multimodal(directory: pathlib.Path) -> bool:
    """Whether a directory holds a whole multimodal model, in a published layout or ours."""
    file = directory / "config.json"
    return native.is_native(directory) or (file.exists() and is_composite(read_json(file)))


def load_extras(path: str | pathlib.Path) -> dict[str, Any]:
    """What is recorded of a checkpoint besides its computation (`native.EXTRAS`), by us or by LLaVA's config.json."""
    directory = resolve_path(path)
    if native.is_native(directory):
        return native.load_extras(directory)
    file = directory / "config.json"
    fields = read_json(file) if file.is_file() else {}
    if isinstance(extension := fields.get(EXTENSION), dict):
        return native.read_extras(extension)
    ratio = fields.get("image_aspect_ratio") if "mm_vision_tower" in fields else None
    return {"aspect": ratio} if ratio in ("pad", "square") else {}


def load_processor(path: str | pathlib.Path, tower: str | None = None) -> dict[str, Any]:
    """The image processor of a checkpoint, or of the tower beside it; {} if there is none.

    Args:
      tower: as in `read_composite`.
    """
    file = resolve_path(path) / "config.json"
    if (fields := load_processor_config(path)) or not file.is_file():
        return fields
    named = read_json(file)
    if "mm_vision_tower" not in named:
        return {}
    return load_processor_config(tower or named_by(file, "mm_vision_tower", named["mm_vision_tower"]))


def own_dtype(fields: Mapping[str, Any], directory: pathlib.Path) -> str:
    """The dtype that a published checkpoint is to be computed in: config.json's, or else that of its embedding."""
    inner = fields.get("text_config")
    for part in (fields, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):  # as transformers 5 calls it, and as it did before
            if part.get(key) in native.DTYPES:
                return part[key]
    with contextlib.suppress(FileNotFoundError):
        source = Source(directory)
        for name in source:
            if name.endswith("embed_tokens.weight") and str(source.dtype(name)) in native.DTYPES:
                return str(source.dtype(name))
    return "float32"


def read_composite(path: str | pathlib.Path, tower: str | None = None) -> Composite:
    """What a multimodal checkpoint computes.

    Args:
      tower: the vision tower of a `llava` checkpoint, instead of the one its config names; Mini-Gemini's two as A+B.

    Raises:
      FileNotFoundError, ValueError: no such checkpoint, or one that is not supported.
    """
    file = resolve_path(path) / "config.json"
    fields = read_json(file)
    composite = _read(fields, file, path, tower)
    if EXTENSION in fields:  # which says the dtypes too
        return composite
    dtype = own_dtype(fields, file.parent)
    return dataclasses.replace(
        composite, model=dataclasses.replace(composite.model, dtype=dtype, param_dtype=dtype)
    )


def _read(
    fields: dict[str, Any], file: pathlib.Path, path: str | pathlib.Path, tower: str | None
) -> Composite:
    if "mm_vision_tower" in fields:
        return _llava(fields, file, tower)
    if tower:
        raise ValueError(
            f"{file}: this layout holds its own vision tower, so none can be named; leave out {tower!r}"
        )
    if _is_honeybee(fields):
        return _honeybee(fields, str(file), path)
    if fields.get("model_type") in LLAVA_HF and "text_config" in fields:
        return _llava_hf(fields, str(file), path)
    kind = fields.get("model_type")
    if kind == _POOLS_BEFORE:
        raise ValueError(
            f"{file}: model_type={kind!r} is not supported: its spatial_pool_mode="
            f"{fields.get('spatial_pool_mode', 'average')!r} pools a video's features before the projector, and here "
            "videos are pooled behind it. Its parts can be had: mllm-jax import --part vision, --part llm"
        )
    raise ValueError(
        f"{file}: not a multimodal checkpoint (llava-hf, llava or honeybee layout), by its model_type={kind!r}"
    )


def _model(vision: Encoder | EncodersConfig, llm: Any, **fields: Any) -> ModelConfig:
    return ModelConfig(
        vision=vision, llm=llm, image_size=fields.pop("image_size", vision.image_size), **fields
    )


def _llava_hf(fields: dict[str, Any], where: str, path: str | pathlib.Path) -> Composite:
    vision, vision_family = part_config(fields, "vision_config", families.VISION, where)
    llm, llm_family = part_config(fields, "text_config", families.LLMS, where)
    vision, vocab = with_normalisation(vision, path), llm.vocab
    if extension := fields.get(EXTENSION):
        return Composite(
            "llava-hf", native.model_from_json(extension), (vision_family,), llm_family, (), vocab
        )
    kind = fields["model_type"]
    for key, values in LLAVA_HF[kind].items():
        if (value := fields.get(key, values[0])) not in values:
            raise ValueError(f"{where}: {key}={value!r} is not supported; supported: {values[0]!r}")
    # These classes have a plain output head of their own, tied by either config.
    tied = bool(fields.get("tie_word_embeddings")) or llm.tied
    llm = dataclasses.replace(llm, logit_softcap=None, head_bias=False, tied=tied)
    onevision = kind == "llava_onevision"
    strategy = fields.get("vision_feature_select_strategy", "full" if onevision else "default")
    if vision.class_token != (strategy == "default"):
        raise ValueError(
            f"{where}: vision_feature_select_strategy={strategy!r} keeps the class token or drops a patch of this "
            "tower; only patch features are supported"
        )
    layer, connector, options = fields.get("vision_feature_layer", -1 if onevision else -2), "mlp2x_gelu", ()
    layers = layer if isinstance(layer, list) and layer else [layer]
    if any(type(each) is not int for each in layers):
        raise ValueError(f"{where}: vision_feature_layer={layer!r} must be whole numbers")
    if isinstance(layer, list) and layer:  # features of several layers on the channel axis
        if len(layer) > 1:
            connector = "sci"
            options = (("layers", tuple(vision.resolve_layer(k) for k in layer[1:])),)
        layer = layer[0]
    model = _model(
        vision,
        llm,
        select_layer=layer,
        connector=connector,
        connector_options=options,
        tiles=tile_fields.read_hf(fields, where, vision.image_size),
        video=video_fields.read_hf(kind),
    )
    return Composite("llava-hf", model, (vision_family,), llm_family, (), vocab)


def _llava(fields: dict[str, Any], file: pathlib.Path, tower: str | None) -> Composite:
    where = str(file)
    llm, llm_family = part_config(fields, "text_config", families.LLMS, where)
    keys = ("mm_vision_tower", *(["mm_vision_tower_aux"] if fields.get("mm_vision_tower_aux") else []))
    towers = tower.split("+") if tower and len(keys) > 1 else [tower] if tower else []
    towers = towers or [named_by(file, key, fields[key]) for key in keys]
    if len(towers) != len(keys):
        raise ValueError(
            f"{where} has {len(keys)} vision towers ({', '.join(keys)}); give all of them, as A+B, not {tower!r}"
        )
    found = [_tower(each) for each in towers]
    vision, vision_families = found[0][0], tuple(family for _, family in found)
    if not isinstance(vision, VisionConfig):
        raise ValueError(
            f"{where}: mm_vision_tower={towers[0]!r} is a {vision.title}, whose maps are no patch tokens"
        )
    check_fields(fields, where, vision.class_token)
    connector, options = connector_of(fields, where)
    named = {"connector": connector, "connector_options": tuple(sorted(options.items()))}
    layer = select_layer_of(fields, where, vision.class_token)
    tiles = tile_fields.read_llava(fields, where, vision.image_size)
    video = video_fields.read_llava(fields, where, newline=tiles is not None and tiles.unpads)
    if len(found) > 1:
        if tiles is not None:
            raise ValueError(
                f"{where}: image_aspect_ratio={fields['image_aspect_ratio']!r} with mm_vision_tower_aux"
            )
        vision = encoders_of(fields, where, vision, found[1][0])
        size = max(vision.image_sizes[0] * vision.split, *vision.image_sizes)
        model = _model(vision, llm, image_size=size, select_layer=layer, video=video, **named)
        try:
            vision.grid(size)
        except ValueError as error:  # the two grids do not fit each other
            raise ValueError(f"{where}: {error}") from error
    else:
        model = _model(vision, llm, select_layer=layer, tiles=tiles, video=video, **named)
    if video is not None:
        try:
            _ = model.visual_layout
        except ValueError as error:
            raise ValueError(
                f"{where}: mm_spatial_pool_mode={fields['mm_spatial_pool_mode']!r}: {error}"
            ) from error
    return Composite("llava", model, vision_families, llm_family, tuple(towers), llm.vocab)


def _tower(path: str) -> tuple[Encoder, Family]:
    fields, file = read_config(resolve_path(path, "mini_vit"))
    config, family = part_config(fields, "vision_config", families.VISION, str(file))
    return with_normalisation(config, path), family


def _honeybee(fields: dict[str, Any], where: str, path: str | pathlib.Path) -> Composite:
    fields = {**fields, "model_type": "mllm"}
    vision, vision_family = part_config(fields, "vision_config", families.VISION, where)
    llm, llm_family = part_config(fields, "text_config", families.LLMS, where)
    tower = fields["vision_config"] if isinstance(fields.get("vision_config"), dict) else {}
    if (encoder := tower.get("encoder_type", "openai.clip")) != "openai.clip":
        raise ValueError(f"{where}: encoder_type={encoder!r} is not supported; supported: 'openai.clip'")
    if "image_mean" in tower:  # as later checkpoints say it
        vision = _normalised(vision, tower, where)
    connector, options, layer = honeybee_fields.connector_of(fields, where, vision.width, llm.width)
    model = _model(
        with_normalisation(vision, path),
        llm,
        select_layer=layer,
        connector=connector,
        connector_options=tuple(sorted(options.items())),
    )
    return Composite("honeybee", model, (vision_family,), llm_family, (), llm.vocab)
