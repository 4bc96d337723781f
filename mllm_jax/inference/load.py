"""A model from a checkpoint that was not trained here, ready to be asked."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from mllm_jax.config import ConfigError
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.inference.model import Model
from mllm_jax.interop import load_processor_config, load_tokenizer, resolve_path
from mllm_jax.interop.checkpoints import load_model
from mllm_jax.interop.native import processor_json
from mllm_jax.models.paths import flatten, unflatten
from mllm_jax.parallel.sharding import param_shardings


def load_bundle(
    path: str,
    mesh: Mesh,
    *,
    template: str,
    aspect: str = "pad",
    dtype: str = "bfloat16",
    tower: str | None = None,
    tokenizer: str | None = None,
) -> Model:
    """An imported model (Orbax or safetensors), or a checkpoint in the llava-hf, llava or honeybee layout.

    Args:
      path: directory or hub id.
      mesh: where the parameters go, one tensor at a time.
      template: of the conversations it was trained on; checkpoints do not say.
      aspect: "pad" (LLaVA-1.5) or "square".
      dtype: of parameters and computation.
      tower: vision tower of a llava checkpoint, if not the one that it names.
      tokenizer: directory or hub id of the tokenizer, if not beside the checkpoint.

    Raises:
      ConfigError: not a checkpoint that can be asked; says what is missing.
      FileNotFoundError: no such directory.
    """
    try:
        directory = resolve_path(path)
        config, params, _ = load_model(path, tower, sharding_of=_sharding_of(mesh), dtype=jnp.dtype(dtype))
    except ValueError as error:
        raise ConfigError(f"--model={path}: {error}") from error
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    fields = load_processor_config(directory)
    if (
        "image_mean" not in fields
    ):  # LLaVA's own layout: the tower's processor, which its config already holds
        fields = processor_json(config.vision, config.image_size)
    native = ImageProcessor.from_hf_config(fields, aspect=aspect)
    shortest = round(native.shortest_side * config.image_size / native.size) if native.shortest_side else 0
    processor = dataclasses.replace(native, size=config.image_size, shortest_side=shortest)
    try:
        words = load_tokenizer(tokenizer or str(directory))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory} holds no tokenizer that can be read ({str(error).splitlines()[0]}); give --tokenizer"
        ) from error
    try:
        resolve_template(template, words)
    except ValueError as error:
        raise ConfigError(f"--template={template}: {error}") from error
    return Model(config, params, words, processor, template)


def _sharding_of(mesh: Mesh) -> Callable[[str, tuple[int, ...]], Sharding]:
    def sharding_of(path: str, shape: tuple[int, ...]) -> Sharding:
        tree = unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32)})
        return flatten(param_shardings(tree, mesh))[path]

    return sharding_of
