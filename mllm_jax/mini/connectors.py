"""Connector options at the mini world's scale: the published structure at widths and depths in proportion.

The mini tower is 6 blocks of width 128 where CLIP-L is 24 of 1,024, so widths are an eighth, heads about a
quarter (each half as wide) and depths a quarter or a third of a connector's defaults, but never a single layer
where the original repeats one. A connector then has at most 0.5 M parameters beside an LLM of 1 M, and a step
costs about what it costs with the default connector. What is not listed keeps its default: it is small already.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_jax import connectors

OPTIONS: dict[str, dict[str, Any]] = {
    "q_former": {"hidden": 96, "depth": 3, "heads": 3, "mlp": 384},
    "resampler": {"hidden": 96, "depth": 2, "heads": 3, "mlp": 384},
    "perceiver": {"depth": 2, "heads": 2, "head_width": 32},
    "c_abstractor": {"hidden": 128},
    "d_abstractor": {"hidden": 128, "depth": 2, "heads": 2, "mlp": 128},
    "token_packer": {"hidden": 128, "heads": 2},
}

SPEC = connectors.VisionSpec(width=128, depth=6, select_layer=5, grid=(12, 12))  # the mini tower at 84 px
PATCH = 7  # pixels of its patches
WIDTH = 128  # of the mini LLM


def mini_options(connector: str, tokens: int) -> dict[str, Any]:
    """Options of a connector at this scale.

    Args:
      connector: a name from `connectors.CONNECTORS`.
      tokens: visual tokens per image, for the connectors that have the option.
    """
    sizes = OPTIONS.get(connector, {})
    return {"tokens": tokens, **sizes} if "tokens" in connectors.options(connector) else sizes


def visual_tokens(
    connector: str, tokens: int, image_size: int = 84, options: Mapping[str, Any] | None = None
) -> int:
    """How many visual tokens a connector at this scale makes of an image.

    Args:
      connector, tokens: as for `mini_options`.
      image_size: side of the image, in pixels.
      options: of the connector, instead of those of its size.
    """
    side = image_size // PATCH
    spec = dataclasses.replace(SPEC, grid=(side, side))
    values = {**mini_options(connector, tokens), **(options or {})}
    return connectors.create(connector, spec, WIDTH, values).num_tokens(spec.grid)
