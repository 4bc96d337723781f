"""The strict check of a configuration before any compute: keys, types, choices, combinations."""

import difflib
import math
import re
from typing import Any

from ml_collections import ConfigDict

from mllm_jax import connectors
from mllm_jax.config import NAMED_CHILDREN, ConfigError, default_config, generic_key, join_key

REMAT = ("none", "full", "dots")
DTYPES = ("float32", "bfloat16")
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
    "stages.*.sources.*.duplicate_ids": ("error", "number"),
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


def _unknown(path: str, key: str, valid: ConfigDict) -> ConfigError:
    near = difflib.get_close_matches(key, list(valid), n=1)
    hint = f"did you mean {join_key(path, near[0])!r}? " if near else ""
    if not near and (elsewhere := [place for place in _all_keys() if place.split(".")[-1] == key]):
        hint = f"there is {' and '.join(map(repr, elsewhere))}; "
    valid_here = ", ".join(sorted(valid)) or "nothing"
    return ConfigError(f"unknown config key {join_key(path, key)!r}; {hint}valid here: {valid_here}")


def _all_keys(schema: ConfigDict | None = None, path: str = "") -> list[str]:
    """Every key of the schema, `*` standing for the names that a recipe chooses."""
    schema = default_config() if schema is None else schema
    keys = []
    for key in schema:
        here = join_key(path, key)
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
            raise ConfigError(f"config key {done!r} holds a value, so there is no {join_key(done, key)!r}")
        if key not in node:
            raise _unknown(done, key, node)
        node, done = node[key], join_key(done, key)


def _check_tree(config: ConfigDict, schema: ConfigDict, path: str) -> None:
    for key in config:
        if key not in schema:
            raise _unknown(path, key, schema)
    for key in schema:
        here = join_key(path, key)
        if key not in config:
            raise ConfigError(f"config key {here!r} is missing; start from mllm_jax.config.default_config()")
        value, default = config[key], schema[key]
        child = NAMED_CHILDREN.get(generic_key(here))
        if child is not None:
            if not isinstance(value, ConfigDict):
                raise ConfigError(f"config key {here!r} must be a dict of named entries, not {value!r}")
            for name in value:
                if not NAME.fullmatch(name):
                    raise ConfigError(
                        f"{name!r} in config key {here!r} cannot be a name: use letters, digits, '_' and '-'"
                    )
                _check_entry(value[name], child(), f"{here}.{name}")
        elif generic_key(here) in OPEN:
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
    generic = generic_key(path)
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
