"""The configuration: every key with its default. `mllm_jax.config_check` checks one before any compute.

A recipe in `configs/` starts from `default_config()` and changes values; a user overrides any key on the command line,
as in `--config.model.connector.name=average_pool`. Types are those of the defaults; `None` defaults accept the type
named beside them.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mllm_jax import connectors

LLM_LINEAR = r"llm/blocks/(q|k|v|o|gate|up|down|fc1|fc2)/kernel"  # every linear layer of the LLM but the head


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and the way out."""


@contextlib.contextmanager
def config_key_error(key: str) -> Iterator[None]:
    """Turns a ValueError raised inside into a ConfigError that names the key it comes from."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"config key {key!r}: {error}") from error


def source_config() -> ConfigDict:
    """One training source of a stage: a user's LLaVA-format data set, or pictures of the mini world."""
    return ConfigDict(
        {
            "kind": "llava",
            "json": "",  # LLaVA-format JSON or JSON lines
            "images": "",  # folder that its image paths are relative to
            "duplicate_ids": "error",  # or "number": samples that share an id are told apart as id, id#2, id#3
            "weight": 1.0,  # how often it is drawn, relative to the other sources
            "split": "",  # mini_world: which stream of scenes ("pretrain", "finetune")
            "form": "",  # mini_world: "caption" or "instruct"
            "count": 0,  # mini_world: number of samples
        }
    )


def stage_config() -> ConfigDict:
    """One training stage; defaults are LLaVA-1.5's stage 1 (recipes.md 1.1)."""
    return ConfigDict(
        {
            "trainable": ("connector/.*",),  # path regexes; all else is frozen, LoRA adapters excepted
            "lora": {
                "rank": 0,  # of the adapters; 0 = none
                "alpha": 256.0,  # their update is scaled by alpha / rank
                "dropout": 0.05,  # on their input, in training
                "targets": LLM_LINEAR,  # regex over kernel paths, llm/... and vision/...
                "rank_stabilized": False,  # scale by alpha / sqrt(rank)
            },
            "quantize_base": "none",  # how the LLM's frozen block kernels are kept: "none" or "int8"
            "template": "plain",
            "aspect": placeholder(str),  # "pad" or "square"; None = data.aspect
            "cache_features": False,  # keep the frozen tower's features on disk instead of running it
            "sources": {},  # name -> source_config()
            "seq_len": placeholder(int),  # row length of this stage; None = data.seq_len
            "batch_size": 256,  # samples per update, over all devices and accumulation
            "accumulation": 1,
            "epochs": 1,
            "steps": placeholder(int),  # updates; None = from epochs
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "matrix_learning_rate": 0.02,  # muon only: of the matrices inside the blocks
            # (path regex, rate) pairs for groups that differ; the first match counts
            "learning_rates": (),
            "schedule": "cosine",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "clip_norm": 1.0,  # global norm of the gradient; 0 = no clipping
            "log_every": 10,
            "checkpoint_every": 500,  # updates
            "keep_last": 2,
            "keep_best": 1,  # by the mean training loss since the previous checkpoint
        }
    )


def default_config() -> ConfigDict:
    """Every key with its default. Stages and evaluation are filled in by the recipe."""
    connector = {
        "name": "mlp2x_gelu",
        "path": "",  # a checkpoint whose connector training starts from; "" = fresh weights
    }
    connector |= {
        name: connectors.options(name) for name in connectors.CONNECTORS if connectors.options(name)
    }
    return ConfigDict(
        {
            "seed": 42,
            "model": {
                "vision": {
                    "path": "mini",  # "mini", a directory, or a Hugging Face id
                    "image_size": 84,
                    "select_layer": -2,  # LLaVA's default; P1's choice is unknown
                    "remat": "full",
                },
                "llm": {"path": "mini", "remat": "full"},
                "connector": connector,
                "dtype": "float32",  # computation
                "param_dtype": "float32",  # trained parameters and optimizer state
                "frozen_dtype": "float32",  # parameters that a stage does not train
                "attention": "xla",
            },
            "data": {
                "dir": "",  # where prepared data sets are kept; "" = WORKDIR/data
                "seq_len": 2048,
                "image_slots": 1,  # images a row has room for
                "label_tokens": placeholder(int),  # most supervised tokens of a row; None = seq_len
                "aspect": "pad",
                "compat": "",
                "overlong": "error",
                "max_image_pixels": 178_956_970,
                "threads": 4,
            },
            "stages": {},  # name -> stage_config()
            "stage_order": (),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1 = the remaining devices
            "eval": {
                "template": "vicuna_v1",
                "benchmarks": {},  # name -> {"kind", "path", "count"}
                "batch_size": 16,
                "max_new_tokens": 16,
                "overlong": "error",  # a prompt beyond the context: "error", or "empty" for an empty answer
                "blind": True,
                "likelihood": False,
                "examples": 12,
            },
        }
    )


def benchmark_config() -> ConfigDict:
    """One benchmark that `eval.py` answers."""
    return ConfigDict(
        {
            "kind": "mini",  # "mini", "vqa", "caption" or a published one (docs/benchmarks.md)
            "path": "",  # its question file, or a published one's folder; mini: "" = made in the work directory
            "images": "",
            "count": 0,  # mini: questions per ability
            "max_new_tokens": 0,  # 0 = the official limit, or eval.max_new_tokens where there is none
            "options": {},  # of a published benchmark (docs/benchmarks.md)
        }
    )


# Keys whose children a recipe names freely, and what each child must look like.
NAMED_CHILDREN = {
    "stages": stage_config,
    "stages.*.sources": source_config,
    "eval.benchmarks": benchmark_config,
}


def generic_key(path: str) -> str:
    """A key with `*` for the names that a recipe chooses, such as "stages.*.lora.rank"."""
    path = re.sub(r"^stages\.[^.]+", "stages.*", path)
    path = re.sub(r"^(stages\.\*\.sources)\.[^.]+", r"\1.*", path)
    return re.sub(r"^(eval\.benchmarks)\.[^.]+", r"\1.*", path)


def join_key(path: str, key: str) -> str:
    """A key below another; `path` is empty at the top."""
    return f"{path}.{key}" if path else key


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The configuration as it runs: plain JSON-able values, only the chosen connector's options kept."""
    values = config.to_dict()
    chosen = values["model"]["connector"]["name"]
    values["model"]["connector"] = {
        key: value for key, value in values["model"]["connector"].items() if key in ("name", "path", chosen)
    }
    return _plain(values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def default_of(path: str) -> Any:
    """The default of a key such as "stages.finetune.lora.rank", as `resolved` writes it.

    Raises:
      ConfigError: there is no such key.
    """
    node, done = default_config(), ""
    for key in path.split("."):
        child = NAMED_CHILDREN.get(generic_key(done))
        if child is None and (not isinstance(node, ConfigDict) or key not in node):
            raise ConfigError(f"there is no config key {path!r}")
        node, done = child() if child else node[key], join_key(done, key)
    return _plain(node.to_dict() if isinstance(node, ConfigDict) else node)
