"""The families: one file each, one row here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_jax.interop.families import (
    clip,
    convnext,
    dinov2,
    gemma2,
    llama,
    mistral,
    phi,
    qwen,
    siglip,
    siglip2,
)
from mllm_jax.interop.families.base import Family, complete

__all__ = ["LLMS", "VISION", "Family", "complete", "for_config", "for_type"]

VISION: dict[str, Family] = {
    family.model_type: family
    for family in (
        clip.FAMILY,
        siglip.FAMILY,
        siglip2.FAMILY,
        dinov2.FAMILY,
        dinov2.WITH_REGISTERS,
        convnext.FAMILY,
    )
}
LLMS: dict[str, Family] = {
    family.model_type: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen.QWEN2, qwen.QWEN3, phi.FAMILY, gemma2.FAMILY)
}


def for_type(table: Mapping[str, Family], model_type: Any, where: str) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: not supported; the supported ones are named.
    """
    if not isinstance(model_type, str) or model_type not in table:
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(table)}"
        )
    return table[model_type]


def for_config(table: Mapping[str, Family], config: Any) -> Family:
    """The first family that can express a config exactly.

    Raises:
      ValueError: none can.
    """
    for family in table.values():
        try:
            found = family.config(family.write(config))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # not this family's
        if _comparable(found) == _comparable(config):
            return family
    raise ValueError(f"no Hugging Face family ({', '.join(table)}) can express {config}")


def _comparable(config: Any) -> Any:
    """Without what config.json does not say, and with the windows spelt out."""
    if hasattr(config, "windows"):
        return dataclasses.replace(config, windows=config.block_windows)
    return dataclasses.replace(config, mean=(0.0,) * 3, std=(1.0,) * 3)
