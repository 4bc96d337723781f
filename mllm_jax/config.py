"""The configuration: every key with its default, and the strict check before any compute.

A recipe in `configs/` starts from `default_config()` and changes values; a user overrides any key on the command line,
as in `--config.model.connector.name=average_pool`. Types are those of the defaults; `None` defaults accept the type
named beside them.
"""

import contextlib
import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mllm_jax import connectors

REMAT = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")
LLM_LINEAR = r"llm/blocks/(q|k|v|o|gate|up|down|fc1|fc2)/kernel"  # every linear layer of the LLM but the head
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": DTYPES,
    "model.param_dtype": DTYPES,
    "model.frozen_dtype": DTYPES,
    "model.vision.remat": REMAT,
    "model.llm.remat": REMAT,
    "model.connector.name": tuple(connectors.CONNECTORS),
    "data.aspect": ("pad", "square"),
    "data.overlong": ("error", "skip"),
    "data.compat": ("", "llava"),
    "eval.overlong": ("error", "empty"),
    "stages.*.optimizer": ("adamw", "muon"),
    "stages.*.schedule": ("cosine", "constant"),
    "stages.*.aspect": ("pad", "square"),
    "stages.*.quantize_base": ("none", "int8"),
    "stages.*.sources.*.kind": ("llava", "mini_world"),
}
POSITIVE = (
    "model.vision.image_size",
    "data.seq_len",
    "data.image_slots",
    "data.label_tokens",
    "data.max_image_pixels",
    "stages.*.seq_len",
    "stages.*.batch_size",
    "stages.*.accumulation",
    "stages.*.epochs",
    "stages.*.steps",
    "stages.*.learning_rate",
    "stages.*.matrix_learning_rate",
    "stages.*.eps",
    "stages.*.lora.alpha",
    "stages.*.log_every",
    "stages.*.checkpoint_every",
    "stages.*.keep_last",
    "stages.*.sources.*.weight",
    "eval.batch_size",
    "eval.max_new_tokens",
)
NOT_NEGATIVE = (
    "seed",
    "data.threads",
    "stages.*.weight_decay",
    "stages.*.clip_norm",
    "stages.*.keep_best",
    "stages.*.lora.rank",
    "stages.*.sources.*.count",
    "eval.benchmarks.*.count",
    "eval.benchmarks.*.max_new_tokens",
    "eval.examples",
)
SHARES = (  # from 0 to below 1
    "stages.*.warmup_ratio",
    "stages.*.b1",
    "stages.*.b2",
    "stages.*.lora.dropout",
)
STRINGS = ("stages.*.trainable", "stage_order")  # tuples of strings
OPEN = ("eval.benchmarks.*.options",)  # dicts whose keys are checked by those who read them
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of stages, sources and benchmarks: they name directories


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key and the way out."""


@contextlib.contextmanager
def blaming(key: str) -> Iterator[None]:
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


def _generic(path: str) -> str:
    path = re.sub(r"^stages\.[^.]+", "stages.*", path)
    path = re.sub(r"^(stages\.\*\.sources)\.[^.]+", r"\1.*", path)
    return re.sub(r"^(eval\.benchmarks)\.[^.]+", r"\1.*", path)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _unknown(path: str, key: str, valid: ConfigDict) -> ConfigError:
    near = difflib.get_close_matches(key, list(valid), n=1)
    hint = f"did you mean {_join(path, near[0])!r}? " if near else ""
    if not near and (elsewhere := [place for place in _all_keys() if place.split(".")[-1] == key]):
        hint = f"there is {' and '.join(map(repr, elsewhere))}; "
    valid_here = ", ".join(sorted(valid)) or "nothing"
    return ConfigError(f"unknown config key {_join(path, key)!r}; {hint}valid here: {valid_here}")


def _all_keys(schema: ConfigDict | None = None, path: str = "") -> list[str]:
    """Every key of the schema, `*` standing for the names that a recipe chooses."""
    schema = default_config() if schema is None else schema
    keys = []
    for key in schema:
        here = _join(path, key)
        keys.append(here)
        if child := NAMED_CHILDREN.get(here):
            keys += _all_keys(child(), f"{here}.*")
        elif isinstance(schema.get(key), ConfigDict):
            keys += _all_keys(schema[key], here)
    return keys


def check_key(config: ConfigDict, path: str) -> None:
    """Checks that `path`, such as "model.connector.name", is a key of `config`.

    Raises:
      ConfigError: it is not; the first part that is wrong and the nearest valid key are named.
    """
    node, done = config, ""
    for key in path.split("."):
        if not isinstance(node, ConfigDict):
            raise ConfigError(f"config key {done!r} holds a value, so there is no {_join(done, key)!r}")
        if key not in node:
            raise _unknown(done, key, node)
        node, done = node[key], _join(done, key)


def _check_tree(config: ConfigDict, schema: ConfigDict, path: str) -> None:
    for key in config:
        if key not in schema:
            raise _unknown(path, key, schema)
    for key in schema:
        here = _join(path, key)
        if key not in config:
            raise ConfigError(f"config key {here!r} is missing; start from mllm_jax.config.default_config()")
        value, default = config[key], schema[key]
        child = NAMED_CHILDREN.get(_generic(here))
        if child is not None:
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"config key {here!r} must be a dict of named entries, not {value!r}")
            for name in value:
                if not NAME.fullmatch(name):
                    raise ConfigError(
                        f"{name!r} in config key {here!r} cannot be a name: use letters, digits, '_' and '-'"
                    )
                _check_entry(value[name], child(), f"{here}.{name}")
        elif _generic(here) in OPEN:
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"config key {here!r} must be a dict, not {value!r}")
        elif isinstance(default, ConfigDict):
            _check_entry(value, default, here)
        else:
            _check_value(value, default, schema.get_type(key), here)


def _check_entry(value: Any, schema: ConfigDict, path: str) -> None:
    if not isinstance(value, ConfigDict):
        raise ConfigError(
            f"config key {path!r} must be a dict with {', '.join(sorted(schema))}, not {value!r}"
        )
    _check_tree(value, schema, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_value(value: Any, default: Any, wanted: type, path: str) -> None:
    if value is None and default is None:
        return
    generic = _generic(path)
    if wanted is tuple and isinstance(value, list):
        value = tuple(value)
    fits = _is_number(value) if wanted is float else isinstance(value, wanted)
    if not fits or (wanted is int and isinstance(value, bool)):
        raise ConfigError(f"config key {path!r} must be of type {wanted.__name__}, not {value!r}")
    if generic in STRINGS and not all(isinstance(item, str) for item in value):
        raise ConfigError(f"config key {path!r} must be a tuple of strings, not {value!r}")
    if generic == "stages.*.learning_rates" and not all(_is_rate(item) for item in value):
        raise ConfigError(
            f"config key {path!r} must hold (path regex, positive rate) pairs such as ('llm/.*', 2e-5), not {value!r}"
        )
    if generic in CHOICES and value not in CHOICES[generic]:
        near = difflib.get_close_matches(str(value), [str(c) for c in CHOICES[generic]], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"config key {path!r} is {value!r}; {hint}valid: {', '.join(map(repr, CHOICES[generic]))}"
        )
    if _is_number(value) and not math.isfinite(value):
        raise ConfigError(f"config key {path!r} must be finite, not {value}")
    if generic in POSITIVE and value <= 0:
        raise ConfigError(f"config key {path!r} must be positive, not {value}")
    if generic in NOT_NEGATIVE and value < 0:
        raise ConfigError(f"config key {path!r} must not be negative, but is {value}")
    if generic in SHARES and not 0 <= value < 1:
        raise ConfigError(f"config key {path!r} must be at least 0 and below 1, not {value}")
    if generic.startswith("mesh.") and value < 1 and value != -1:
        raise ConfigError(
            f"config key {path!r} must be positive, or -1 for the remaining devices, not {value}"
        )


def _is_rate(item: Any) -> bool:
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    pattern, rate = item
    return isinstance(pattern, str) and _is_number(rate) and 0 < rate < math.inf


def check(config: ConfigDict) -> None:
    """Checks keys, types, choices and combinations.

    Raises:
      ConfigError: naming the key, what is wrong, and the nearest valid key or value.
    """
    _check_tree(config, default_config(), "")
    if not config.stages:
        raise ConfigError("config key 'stages' is empty; add a stage_config() and name it in 'stage_order'")
    if sorted(config.stage_order) != sorted(config.stages):
        raise ConfigError(
            f"config key 'stage_order' {tuple(config.stage_order)} must name each of the stages "
            f"{tuple(config.stages)} once"
        )
    for name, stage in config.stages.items():
        here = f"stages.{name}"
        if not stage.trainable and not stage.lora.rank:
            raise ConfigError(f"config key '{here}.trainable' is empty: nothing would be trained")
        if not stage.sources:
            raise ConfigError(
                f"config key '{here}.sources' is empty; add a source with a json and an image folder"
            )
        if stage.batch_size % stage.accumulation:
            raise ConfigError(
                f"config key '{here}.batch_size' ({stage.batch_size}) must be a multiple of "
                f"'{here}.accumulation' ({stage.accumulation})"
            )
        groups = (pattern for pattern, _ in stage.learning_rates)
        for pattern in (*stage.trainable, *groups, stage.lora.targets):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"'{here}': {pattern!r} is not a regular expression: {error}") from error
        for source, values in stage.sources.items():
            where = f"{here}.sources.{source}"
            if values.kind == "llava" and not values.json:
                raise ConfigError(
                    f"config key '{where}.json' is empty; give the path of a LLaVA-format JSON file"
                )
            if values.kind == "mini_world" and (
                values.count <= 0 or values.form not in ("caption", "instruct")
            ):
                raise ConfigError(f"'{where}': mini_world needs count > 0 and form 'caption' or 'instruct'")


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
        child = NAMED_CHILDREN.get(_generic(done))
        if child is None and (not isinstance(node, ConfigDict) or key not in node):
            raise ConfigError(f"there is no config key {path!r}")
        node, done = child() if child else node[key], _join(done, key)
    return _plain(node.to_dict() if isinstance(node, ConfigDict) else node)
