"""Runs of train.py as checkpoints: the model that a configuration describes, and the parameters that a stage left."""

import dataclasses

import jax
from ml_collections import ConfigDict

from mllm_jax import interop
from mllm_jax.config import ConfigError, config_key_error, default_of
from mllm_jax.data.anyres import Tiles
from mllm_jax.data.naflex import NaFlexProcessor, Processor
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.video_layout import Video
from mllm_jax.interop import native
from mllm_jax.interop.saved_params import REWRITE, CheckpointError, first_difference, is_complete, reading
from mllm_jax.models import lora, mllm, paths, quantize
from mllm_jax.models.encoders import Encoder, EncodersConfig
from mllm_jax.models.lora import LoRA
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.storage import Path, read_text


def model_config(config: ConfigDict) -> ModelConfig:
    """The model's computation from a checked configuration and the two checkpoints' `config.json`.

    Raises:
      ConfigError: a combination that cannot work (resolution, layer, connector options, context length).
    """
    chosen = config.model.connector.name
    options = config.model.connector.get(chosen, ConfigDict()).to_dict()
    with config_key_error("model.vision.path"):
        vision = _together(interop.vision_config(config.model.vision.path), config)
    with config_key_error("model.llm.path"):
        llm = interop.llm_config(config.model.llm.path)
    with config_key_error("model.vision.select_layer"):
        vision.resolve_layer(config.model.vision.select_layer)
    tiles = None
    if (values := config.model.get("tiles")) and values.merge != "none":
        with config_key_error("model.tiles"):
            pinpoints = tuple((columns, rows) for columns, rows in values.pinpoints)
            tiles = Tiles(**{**values.to_dict(), "pinpoints": pinpoints})
    video = video_settings(config)
    with config_key_error("model"):
        model = ModelConfig(
            vision=vision,
            llm=llm,
            image_size=config.model.vision.image_size,
            select_layer=config.model.vision.select_layer,
            connector=chosen,
            connector_options=tuple(sorted(options.items())),
            dtype=config.model.dtype,
            param_dtype=config.model.param_dtype,
            remat=config.model.llm.remat,
            vision_remat=config.model.vision.remat,
            attention=config.model.attention,
            tiles=tiles,
            video=video,
            max_patches=config.model.vision.get("max_patches", 0),
        )
    if model.image_size < model.vision.patch:
        raise ConfigError(
            f"config key 'model.vision.image_size' is {model.image_size}, less than one patch of {model.vision.patch}"
        )
    with config_key_error("model.connector"):
        visual = model.visual_layout.slot.num_tokens
    lengths = {
        f"stages.{name}.seq_len": stage.seq_len for name, stage in config.stages.items() if stage.seq_len
    }
    for key, length in {"data.seq_len": config.data.seq_len, **lengths}.items():
        if length > model.llm.max_positions:
            raise ConfigError(
                f"config key {key!r} is {length}, more than the LLM's {model.llm.max_positions} positions"
            )
        if length <= visual:
            raise ConfigError(
                f"config key {key!r} is {length}, but one image already takes {visual} tokens; raise it or choose a "
                "compressing connector"
            )
    for name, stage in config.stages.items():
        slots, most = stage.image_slots or config.data.image_slots, model.visual_layout.most_slots
        if slots < most:
            key = f"stages.{name}.image_slots" if stage.image_slots else "data.image_slots"
            what, fewer = "an image in tiles", "pinpoints of fewer tiles (model.tiles.pinpoints)"
            if video and most == video.frames:
                what, fewer = "a video", "fewer frames (model.video.frames)"
            raise ConfigError(
                f"config key {key!r} is {slots}, but {what} fills up to {most} slots; raise it, or take {fewer}"
            )
    return model


def video_settings(config: ConfigDict) -> Video | None:
    """How a configuration reads videos; None if it does not.

    Raises:
      ConfigError: settings that cannot go together.
    """
    values = config.model.get("video")
    if not values or not values.frames:
        return None
    with config_key_error("model.video"):
        return Video(**values.to_dict())


def _together(vision: Encoder | EncodersConfig, config: ConfigDict) -> Encoder | EncodersConfig:
    """The encoders, used together as the configuration says; its defaults leave what a model directory records.

    Raises:
      ConfigError: it says so of a single one.
    """
    given = {key: config.model.vision.get(key) for key in ("image_sizes", "combine", "split", "overview")}
    asked = {
        key: tuple(value) if key == "image_sizes" else value
        for key, value in given.items()
        if value and value != default_of(f"model.vision.{key}")
    }
    if not asked:
        return vision
    if not isinstance(vision, EncodersConfig):
        named = " and ".join(f"'model.vision.{key}'" for key in asked)
        raise ConfigError(f"config key {named}: for several encoders, given as A+B in model.vision.path")
    return dataclasses.replace(vision, **asked)


def image_processor(config: ConfigDict, aspect: str | None = None) -> Processor:
    """The tower's preprocessing at the configured resolution; `aspect` as in `data.aspect`, which is the default."""
    if most := config.model.vision.get("max_patches"):
        vision = interop.vision_config(config.model.vision.path)
        return NaFlexProcessor(vision.patch, most, vision.mean, vision.std)
    fields = interop.load_processor_config(config.model.vision.path)
    published = ImageProcessor.from_hf_config(fields, aspect=aspect or config.data.aspect)
    return published.at_size(config.model.vision.image_size)


def lora_settings(stage: ConfigDict) -> LoRA | None:
    """The adapters of a stage; None if it has none (as the stages of runs from before there were any)."""
    values = stage.get("lora")
    return LoRA(**values.to_dict()) if values and values.rank else None


def is_quantized(stage: ConfigDict) -> bool:
    """Whether a stage keeps the LLM's frozen kernels as int8."""
    return stage.get("quantize_base", "none") == "int8"


def merged(params: Params, stage: ConfigDict, dtype: str) -> Params:
    """A stage's model without adapters and without int8: the weights that it computes with.

    Args:
      dtype: of kernels that were int8.
    """
    if is_quantized(stage):
        params = quantize.dequantize(params, dtype)
    settings = lora_settings(stage)
    return lora.merge(params, settings) if settings else params


def is_run(directory: Path) -> bool:
    """Whether a directory is a work directory of train.py."""
    file = directory / "config.json"  # not parsed here: a damaged one is named when it is read
    return file.exists() and '"stage_order"' in read_text(file, errors="replace")


def finished_stages(directory: Path, config: ConfigDict) -> list[str]:
    """The stages of a run whose parameters are complete, in order."""
    return [name for name in config.stage_order if is_complete(directory / "params" / name)]


def stage_params(directory: Path, model: ModelConfig, sharding_of: native.ShardingOf | None = None) -> Params:
    """What a finished stage left in `WORKDIR/params/STAGE`, in the dtypes it was trained in; adapters not merged.

    Args:
      directory: of the stage's parameters.
      model: the run's model, without adapters.
      sharding_of: (path, shape) -> sharding; None gives NumPy arrays.

    Raises:
      FileNotFoundError: there are none.
      CheckpointError: they belong to another model (the first difference is named) or cannot be read.
    """
    if not is_complete(directory):
        raise FileNotFoundError(f"no parameters at {directory}; train the stage first or give another path")
    with reading(directory, REWRITE):
        held = native.stored_tree(directory)
        params = native.load_tree(directory, None, sharding_of)
    added = ("lora_a", "lora_b", "kernel_scale")
    base = {path: jax.ShapeDtypeStruct(shape, kind) for path, (kind, shape) in held.items()}
    base = paths.unflatten(
        {path: leaf for path, leaf in base.items() if path.rsplit("/", 1)[-1] not in added}
    )
    if difference := first_difference(base, mllm.abstract_params(model)):
        raise CheckpointError(
            f"checkpoint {directory} does not fit this model: {difference}; use the configuration that wrote it"
        )
    return params
