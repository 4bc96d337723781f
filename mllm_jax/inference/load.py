"""A model that is ready to be asked, from whatever holds one: a run, an imported model, a published checkpoint."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from ml_collections import ConfigDict

from mllm_jax.config import ConfigError
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.naflex import NaFlexProcessor, Processor
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.templates import NAMES
from mllm_jax.inference import runs
from mllm_jax.inference.model import Model
from mllm_jax.interop import load_tokenizer, native, resolve_path
from mllm_jax.interop.checkpoints import load_model
from mllm_jax.interop.composite import load_extras, load_processor
from mllm_jax.interop.native import DTYPES
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.models.paths import flatten, unflatten
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.storage import Path, as_path
from mllm_jax.workdir import saved_config


def load(
    path: str | Path,
    *,
    template: str | None = None,
    stage: str | None = None,
    aspect: str | None = None,
    dtype: str | None = None,
    tower: str | None = None,
    tokenizer: str | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """Loads a model.

    Examples:
      >>> import mllm_jax
      >>> model = mllm_jax.load("runs/quickstart")  # a run
      >>> model = mllm_jax.load("models/llava", template="vicuna_v1")  # a checkpoint
      >>> isinstance(model.generate("cat.jpg", "What is this?", max_new_tokens=4), str)
      True

    Args:
      path: the work directory of a run of train.py, also in a bucket (gs://); a directory that `mllm-jax import` or
        `export` wrote; a checkpoint in the llava-hf, llava or honeybee layout, as a directory or a Hugging Face id.
        Directories may be in a bucket.
      template: name of the conversation template that the model was trained with (`data.templates`). A run and what
        is exported from it record it; a published checkpoint does not, so there it must be given ("vicuna_v1" for
        LLaVA-1.5).
      stage: of a run: the model after this stage; None = the last one.
      aspect: "pad" or "square", how images that are not square were brought to size in training (`data.aspect`);
        None = what is recorded (by a run and what is exported from it), else "pad", as LLaVA-1.5.
      dtype: of parameters and computation, "float32", "bfloat16" or "float16"; None = the checkpoint's own: what is
        recorded, what a published config.json names (float16 for LLaVA-1.5), or else the dtype of its weights.
      tower: vision tower of a llava checkpoint, if not the one that it names.
      tokenizer: directory or hub id of the tokenizer, if not beside the checkpoint.
      mesh: where the parameters go, one tensor at a time; None = the first device.

    Raises:
      ConfigError: not a model that can be asked, or something is missing that has to be given; says what.
      FileNotFoundError: there is no such directory or stage.
      CheckpointError: a run's parameters cannot be read.
    """
    try:
        directory = as_path(os.path.expanduser(path))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if runs.is_run(directory):
        given = {"aspect": aspect, "dtype": dtype, "tower": tower, "tokenizer": tokenizer}
        if useless := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{directory} is a run, which records its {useless[0]}; leave {useless[0]} out")
        return _load_run(directory, stage, template, mesh)
    if stage is not None:
        raise ConfigError(f"stage={stage!r} is of a run of train.py, and {path} is none; leave it out")
    return _load_checkpoint(path, template, aspect, dtype, tower, tokenizer, mesh)


def _load_run(directory: Path, stage: str | None, template: str | None, mesh: Mesh | None) -> Model:
    config = saved_config(directory)
    stage = stage or config.stage_order[-1]
    if stage not in config.stage_order:
        raise ConfigError(f"stage {stage!r}: {directory} has {', '.join(config.stage_order)}")
    tokenizer = load_tokenizer(config.model.llm.path)
    _check_template(template or config.eval.template, tokenizer)
    model = runs.model_config(config)
    params = runs.stage_params(directory / "params" / stage, model, _sharding_of(mesh, model))
    params = runs.merged(params, config.stages[stage], config.model.frozen_dtype)
    loaded = trained_model(config, model, params, tokenizer, template)
    return dataclasses.replace(loaded, mesh=mesh)


def trained_model(
    config: ConfigDict, model: ModelConfig, params: Params, tokenizer: Any, template: str | None = None
) -> Model:
    """A model from the parameters that training ends with, adapters merged.

    It computes attention by "xla", wherever and however it was trained, so that its answers are the same everywhere.

    Args:
      template: None = `config.eval.template`.
    """
    return Model(
        dataclasses.replace(model, attention="xla"),
        params,
        tokenizer,
        runs.image_processor(config),
        template or config.eval.template,
        compat=config.data.compat or None,
        max_image_pixels=config.data.max_image_pixels,
    )


def _load_checkpoint(
    path: str | pathlib.Path,
    template: str | None,
    aspect: str | None,
    dtype: str | None,
    tower: str | None,
    tokenizer: str | None,
    mesh: Mesh | None,
) -> Model:
    directory = resolve_path(path)
    if not native.is_native(directory) and not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} holds no model (neither model.json nor config.json); give a run, a model directory, a "
            "checkpoint or a hub id"
        )
    recorded = load_extras(directory)
    template = template or recorded.get("template")
    if template is None:
        raise ConfigError(
            f"{path} does not say which conversation template it was trained with; give template=NAME (eval.py: "
            f"--template=NAME), such as vicuna_v1 for LLaVA-1.5; one of: {NAMES}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}; valid: {', '.join(DTYPES)}")
    try:
        config, params, _ = load_model(
            path, tower, shardings_for=functools.partial(_sharding_of, mesh), dtype=dtype and jnp.dtype(dtype)
        )
        processor = _processor(path, tower, config, aspect or recorded.get("aspect", "pad"))
    except ValueError as error:
        raise ConfigError(f"model {path}: {error}") from error
    config = dataclasses.replace(config, attention="xla")  # as a run's model answers: see `trained_model`
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    try:
        loaded = load_tokenizer(tokenizer or str(directory))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory} holds no tokenizer that can be read ({str(error).splitlines()[0]}); give its place as "
            "`tokenizer`"
        ) from error
    _check_template(template, loaded)
    return Model(config, params, loaded, processor, template, mesh=mesh)


def _processor(path: str | pathlib.Path, tower: str | None, config: ModelConfig, aspect: str) -> Processor:
    if config.max_patches:
        return NaFlexProcessor.of(config)
    fields = load_processor(path, tower) or native.processor_json(config.vision, config.image_size)
    return ImageProcessor.from_hf_config(fields, aspect=aspect).at_size(config.image_size)


def _check_template(template: str, tokenizer: Any) -> None:
    try:
        resolve_template(template, tokenizer)
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}") from error


def _sharding_of(mesh: Mesh | None, model: ModelConfig) -> native.ShardingOf:
    def sharding_of(path: str, shape: tuple[int, ...]) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        tree = unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32)})
        return flatten(param_shardings(tree, mesh, model))[path]

    return sharding_of
