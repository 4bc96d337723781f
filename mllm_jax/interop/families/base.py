"""What a model family is: a reader and a writer of its config.json and a weight-name table."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from mllm_jax.interop.rules import Rule

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One encoder or LLM family.

    Attributes:
      model_type: of config.json (and of `hf_config`).
      architecture: the transformers class that loads an export.
      read: completed config.json -> our config.
      write: our config -> config.json. A family can express a config exactly when reading back what it wrote
        gives the same config.
      rules: weight-name table of a config, in the canonical (hub) spelling without the tower's prefix.
      ignored: (regex, why) of tensors that are known and not used.
      fillers: (name, shape, value) of tensors that transformers wants and we do not have.
    """

    model_type: str
    architecture: str
    read: Callable[[Json], Any]
    write: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], tuple[Rule, ...]]
    ignored: tuple[tuple[str, str], ...] = ()
    fillers: Callable[[Any], tuple[tuple[str, tuple[int, ...], float], ...]] = lambda config: ()


@functools.cache
def _config_classes() -> Mapping[str, Any]:
    # Imported late: transformers takes seconds.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING


def complete(model_type: str, fields: Json) -> dict[str, Any]:
    """config.json with the defaults of transformers' config class filled in and old spellings renamed.

    Published files leave out what equals a default, and rope settings changed their name in transformers 5.

    Raises:
      ValueError: values that transformers' config class refuses.
    """
    known = {key: value for key, value in fields.items() if key not in ("transformers_version", "model_type")}
    try:
        return _config_classes()[model_type](**known).to_dict()
    except Exception as error:  # transformers' validation has its own exception types
        raise ValueError(f"not a valid {model_type} configuration: {error}") from error
