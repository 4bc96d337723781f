"""What can be known to fail before anything is computed: every stage, not only the first one.

`mllm_jax.config.check` comes before it; `mllm_jax.evaluation.preflight` does the same for the evaluation at the end.
"""

from collections.abc import Container
from typing import Any

from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from mllm_jax import interop
from mllm_jax.config import ConfigError, check_paths, config_key_error, row_lengths
from mllm_jax.data.chat_template import check_template, resolve_template
from mllm_jax.data.layout import LayoutRule, WholeImage
from mllm_jax.inference import runs
from mllm_jax.interop.checkpoints import load_connector
from mllm_jax.mini.world.dataset import BENCHMARK
from mllm_jax.mini.world.scene import SPLITS
from mllm_jax.models import lora, mllm
from mllm_jax.models.attention_uses import chosen_backends
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel.mesh import num_row_shards
from mllm_jax.parallel.row_parts import row_part
from mllm_jax.training import adapters
from mllm_jax.training.optimizer import peak_rates


def check_stages(
    config: ConfigDict, model: ModelConfig, tokenizer: Any, mesh: Mesh, prepared: Container[str] = ()
) -> None:
    """Finds before any compute what would stop a later stage.

    Args:
      prepared: sources ("STAGE/SOURCE") that this run has prepared before, whose files may be gone by now.

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
        with config_key_error("model.connector.path"):
            load_connector(
                config.model.connector.path,
                model,
                allow_mismatch=config.model.connector.allow_mismatch,
                template=config.eval.template,
            )
    with config_key_error("model.llm.path"):
        interop.check_llm(config.model.llm.path)
    with config_key_error("model.vision.path"):
        interop.check_vision(config.model.vision.path, model.make_connector().request().deepest, model.vision)
    check_mesh(config, model, mesh)
    with config_key_error("model.attention"):
        for length in row_lengths(config):
            chosen_backends(model, length)
    params = mllm.abstract_params(model)
    for name, stage in config.stages.items():
        here = f"stages.{name}"
        check_batch_size(config, name, mesh)
        check_packing(config, name, model.visual_layout)
        with config_key_error(f"{here}.template"):
            check_template(resolve_template(stage.template, tokenizer), tokenizer)
        if stage.lora.rank:
            with config_key_error(f"{here}.lora.targets"):
                lora.target_paths(params, runs.lora_settings(stage))
        with config_key_error(f"{here}.trainable"):
            trained, _ = adapters.abstract_split(params, stage)
        if stage.cache_features and "vision" in trained:
            raise ConfigError(
                f"config key '{here}.cache_features': this stage trains the vision tower, so its features change; set "
                "it to False or freeze the tower"
            )
        with config_key_error(f"{here}.learning_rates"):
            peak_rates(trained, stage.learning_rate, tuple(tuple(group) for group in stage.learning_rates))
        for source, values in stage.sources.items():
            if f"{name}/{source}" not in prepared and not config.data.prepared:
                check_source(values, f"{here}.sources.{source}")
    order = config.stage_order
    if lost := adapters.lost_kernel(params, [config.stages[name] for name in order]):
        index, path = lost
        raise ConfigError(
            f"config key 'stages.{order[index]}.quantize_base' is 'int8', but {path!r} was changed by an earlier stage "
            f"and {order[index + 1]!r} goes on from it; set it to 'none'"
        )


def check_mesh(config: ConfigDict, model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a mesh on which rows cannot be split as it says.

    Raises:
      ConfigError: naming the key and the fix.
    """
    if isinstance(mesh, Mesh):  # one that is planned without devices has no hosts either
        row_part(mesh)
    sequence, devices = mesh.shape["sequence"], mesh.shape["sequence"] * mesh.shape["tensor"]
    if sequence == 1:
        return
    if model.llm.heads % devices:
        raise ConfigError(
            f"config key 'mesh.sequence' ({sequence}) x 'mesh.tensor' ({mesh.shape['tensor']}) must divide the "
            f"{model.llm.heads} attention heads of the LLM: devices that share a row compute different heads of it"
        )
    for name, stage in config.stages.items():
        if (length := stage.seq_len or config.data.seq_len) % sequence:
            key = f"stages.{name}.seq_len" if stage.seq_len else "data.seq_len"
            raise ConfigError(
                f"config key '{key}' ({length}) must be a multiple of 'mesh.sequence' ({sequence}); take "
                f"{length + -length % sequence}"
            )


def check_batch_size(config: ConfigDict, name: str, mesh: Mesh | AbstractMesh) -> None:
    """Refuses rows of one sample that the devices cannot share; packed rows are filled up to a number that they can.

    Raises:
      ConfigError: naming the key.
    """
    stage, devices = config.stages[name], num_row_shards(mesh)
    if stage.samples_per_row == 1 and stage.batch_size % (devices * stage.accumulation):
        raise ConfigError(
            f"config key 'stages.{name}.batch_size' ({stage.batch_size}) must be a multiple of devices ({devices}) x "
            f"accumulation ({stage.accumulation})"
        )


def check_packing(config: ConfigDict, name: str, rule: LayoutRule) -> None:
    """Refuses `pack_by="text"` where rows cannot be filled by their text.

    Raises:
      ConfigError: one sample a row, images of different numbers of tokens, or no room for text.
    """
    stage, key = config.stages[name], f"config key 'stages.{name}.pack_by' is 'text', but"
    if stage.pack_by != "text":
        return
    if stage.samples_per_row == 1:
        raise ConfigError(
            f"{key} rows hold one sample each; raise 'stages.{name}.samples_per_row' or set it to 'tokens'"
        )
    if not isinstance(rule, WholeImage):
        raise ConfigError(
            f"{key} images have different numbers of visual tokens with tiles, videos and native resolutions; set it "
            "to 'tokens'"
        )
    length, slots = stage.seq_len or config.data.seq_len, stage.image_slots or config.data.image_slots
    if slots * rule.most_tokens >= length:
        raise ConfigError(
            f"{key} {slots} image slots of {rule.most_tokens} visual tokens leave no room for text in rows of {length} "
            f"tokens; raise 'stages.{name}.seq_len' or lower 'stages.{name}.image_slots'"
        )


def check_source(values: ConfigDict, key: str) -> None:
    """Looks for a source's files, or the mini world's split.

    Raises:
      ConfigError, FileNotFoundError: naming the key.
    """
    if values.kind == "llava":
        check_paths(values, key)
    elif values.split not in SPLITS or values.split == BENCHMARK:
        valid = [split for split in SPLITS if split != BENCHMARK]
        raise ConfigError(
            f"config key '{key}.split' is {values.split!r}; valid: {', '.join(map(repr, valid))}"
        )
