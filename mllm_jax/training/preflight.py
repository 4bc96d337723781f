"""What can be known to fail before anything is computed: every stage and the evaluation, not only what runs first."""

import pathlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, blaming
from mllm_jax.data.chat_template import check_template, resolve_template
from mllm_jax.data.mini_world.dataset import BENCHMARK
from mllm_jax.data.mini_world.scene import SPLITS
from mllm_jax.interop.checkpoints import load_connector
from mllm_jax.models import mllm, paths
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel.mesh import num_row_shards
from mllm_jax.training.optimizer import peak_rates


def check_stages(config: ConfigDict, model: ModelConfig, tokenizer: Any, mesh: Mesh) -> None:
    """Finds before any compute what would stop a later stage or the evaluation at its end.

    Raises:
      ConfigError: naming the key.
      FileNotFoundError: naming the key and the file.
    """
    if len(tokenizer) > model.llm.vocab:
        raise ConfigError(
            f"config key 'model.llm.path': the tokenizer has {len(tokenizer)} tokens, more than the LLM's vocabulary "
            f"of {model.llm.vocab}"
        )
    if config.model.connector.path:
        with blaming("model.connector.path"):
            load_connector(config.model.connector.path, model)
    params = mllm.abstract_params(model)
    for name, stage in config.stages.items():
        here = f"stages.{name}"
        if stage.batch_size % (num_row_shards(mesh) * stage.accumulation):
            raise ConfigError(
                f"config key '{here}.batch_size' ({stage.batch_size}) must be a multiple of devices "
                f"({num_row_shards(mesh)}) x accumulation ({stage.accumulation})"
            )
        with blaming(f"{here}.template"):
            _check_template(stage.template, tokenizer)
        with blaming(f"{here}.trainable"):
            trained, _ = paths.split(params, stage.trainable)
        with blaming(f"{here}.learning_rates"):
            peak_rates(trained, stage.learning_rate, tuple(tuple(group) for group in stage.learning_rates))
        for source, values in stage.sources.items():
            _check_source(values, f"{here}.sources.{source}")
    if config.eval.benchmarks:
        with blaming("eval.template"):
            _check_template(config.eval.template, tokenizer)
    for name, values in config.eval.benchmarks.items():
        _check_paths(values, f"eval.benchmarks.{name}", ("path", "images"))


def _check_template(name: str, tokenizer: Any) -> None:
    check_template(resolve_template(name, tokenizer), tokenizer)


def _check_source(values: ConfigDict, key: str) -> None:
    if values.kind == "llava":
        _check_paths(values, key, ("json", "images"))
    elif values.split not in SPLITS or values.split == BENCHMARK:
        valid = [split for split in SPLITS if split != BENCHMARK]
        raise ConfigError(
            f"config key '{key}.split' is {values.split!r}; valid: {', '.join(map(repr, valid))}"
        )


def _check_paths(values: ConfigDict, key: str, names: Sequence[str]) -> None:
    for name in names:
        if values[name] and not pathlib.Path(values[name]).exists():
            raise FileNotFoundError(f"config key '{key}.{name}': there is no {values[name]}")
