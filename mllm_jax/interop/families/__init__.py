"""The families: one file each, one row here."""

import dataclasses
from typing import Any

from mllm_jax.interop.families import clip, llama, siglip
from mllm_jax.interop.families.base import Family

__all__ = ["LLMS", "VISION", "Family", "for_config", "for_type"]

VISION: dict[str, Family] = {f.model_type: f for f in (clip.FAMILY, siglip.FAMILY)}
LLMS: dict[str, Family] = {f.model_type: f for f in (llama.FAMILY,)}


def for_type(table: dict[str, Family], model_type: Any, where: str) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: not supported; the supported ones are named.
    """
    if model_type not in table:
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(table)}"
        )
    return table[model_type]


def for_config(table: dict[str, Family], config: Any) -> Family:
    """The first family that can express a config exactly.

    Raises:
      ValueError: none can.
    """
    from mllm_jax.interop.families.base import complete

    for family in table.values():
        try:
            fields = complete(family.model_type, family.write(config))
            if family.read(fields) == _without_preprocessing(config, family.read(fields)):
                return family
        except (KeyError, ValueError):
            continue
    raise ValueError(f"no Hugging Face family ({', '.join(table)}) can express {config}")


def _without_preprocessing(config: Any, like: Any) -> Any:
    """mean, std and interpolation are not in config.json: taken from `like`."""
    if not hasattr(config, "mean"):
        return config
    return dataclasses.replace(config, mean=like.mean, std=like.std, interpolation=like.interpolation)
