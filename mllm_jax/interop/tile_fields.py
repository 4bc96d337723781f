"""How published checkpoints say that their images are cut into tiles (AnyRes), read and written.

Sources: transformers' `llava_next` and `llava_onevision`; haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT
`llava/mm_utils.py`, `llava/train/train.py`, `llava/model/llava_arch.py`.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from mllm_jax import limits
from mllm_jax.data.anyres import MERGES, Tiles

Pinpoints = tuple[tuple[int, int], ...]

# The defaults of transformers, as heights and widths in pixels.
_NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def read_hf(fields: Mapping[str, Any], where: str, side: int) -> Tiles | None:
    """The tiles of a config of transformers' LLaVA classes; None for the plain one.

    Args:
      fields: of config.json.
      where: the file, for messages.
      side: of the vision encoder's images in pixels.

    Raises:
      ValueError: naming the entry.
    """
    kind, key = fields["model_type"], "image_grid_pinpoints"
    if kind == "llava":
        return None
    pairs = fields.get(key)
    if pairs is None:
        pairs = _NEXT if kind == "llava_next" else _ONEVISION
    pinpoints = tuple((width, height) for height, width in _in_tiles(pairs, where, key, side))
    if kind == "llava_next":
        return Tiles(pinpoints, rounding="round")
    ratio = fields.get("vision_aspect_ratio", "anyres_max_9")
    return Tiles(
        pinpoints,
        max_tiles=_max_tiles(ratio, where, "vision_aspect_ratio"),
        rounding="round",
        several="whole",
    )


def read_llava(fields: Mapping[str, Any], where: str, side: int) -> Tiles | None:
    """The tiles of LLaVA's own config.json; None where `image_aspect_ratio` asks for none.

    Args, Raises: as `read_hf`.
    """
    ratio, key = fields.get("image_aspect_ratio"), "image_grid_pinpoints"
    if not is_anyres(ratio):
        return None
    pinpoints = fields.get(key)
    if isinstance(pinpoints, str):
        pinpoints = _spelled(pinpoints, where, side)
    merge = fields.get("mm_patch_merge_type") or "flat"
    if merge not in MERGES:
        raise ValueError(
            f"{where}: mm_patch_merge_type={merge!r} is not supported; supported: {', '.join(MERGES)}"
        )
    most = 0 if ratio == "anyres" else _max_tiles(ratio, where, "image_aspect_ratio")
    most = most if "unpad" in merge else 0  # the others do not look at it
    return Tiles(
        _in_tiles(pinpoints, where, key, side),
        merge,
        max_tiles=most,
        several="tiles" if ratio == "anyres" else "whole",
    )


def is_anyres(ratio: Any) -> bool:
    """Whether an `image_aspect_ratio` cuts images into tiles as it is done here."""
    return isinstance(ratio, str) and re.fullmatch(r"anyres(_max_[1-9]\d{0,3})?", ratio) is not None


def _max_tiles(ratio: Any, where: str, key: str) -> int:
    if not is_anyres(ratio) or ratio == "anyres":
        raise ValueError(f"{where}: {key}={ratio!r} is not supported; supported: 'anyres_max_9' and its like")
    return int(ratio.removeprefix("anyres_max_"))


def _spelled(text: str, where: str, side: int) -> Any:
    """Pinpoints written as a Python list, or as a range of (columns x rows) of tiles."""
    if found := re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", text.replace(" ", "")):
        left, top, right, bottom = map(int, found.groups())
        limits.check("MAX_IMAGE_SIDE", max(right, bottom) * side, f"{where}: image_grid_pinpoints")
        return [[i * side, j * side] for i in range(left, right + 1) for j in range(top, bottom + 1)]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise ValueError(
            f"{where}: image_grid_pinpoints={text!r} must be a list of sizes, or a range such as '(1x1),...,(6x6)'"
        ) from None


def _in_tiles(pairs: Any, where: str, key: str, side: int) -> Pinpoints:
    """Pairs of pixels as pairs of tiles."""
    fits = isinstance(pairs, list | tuple) and 0 < len(pairs) <= 4096
    for pair in pairs if fits else ():
        whole = (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)
        )
        if not whole or any(n % side for n in pair):
            raise ValueError(
                f"{where}: {key} holds {pair!r}; supported: pairs of multiples of the {side} pixels that the vision "
                "tower sees"
            )
        limits.check("MAX_IMAGE_SIDE", max(pair), f"{where}: {key}")
    if not fits:
        raise ValueError(f"{where}: {key}={pairs!r} must be a list of sizes")
    return tuple((one // side, other // side) for one, other in pairs)


def write_llava(tiles: Tiles | None, side: int, aspect: str) -> dict[str, Any]:
    """The entries of LLaVA's config.json that `read_llava` reads.

    Args:
      aspect: how an image that is not square is brought to size where there are no tiles.
    """
    if tiles is None:
        return {"image_aspect_ratio": aspect}
    most = f"_max_{tiles.max_tiles}" if tiles.max_tiles else ""
    return {
        "image_aspect_ratio": f"anyres{most}",
        "mm_patch_merge_type": tiles.merge,
        "image_grid_pinpoints": [[columns * side, rows * side] for columns, rows in tiles.pinpoints],
    }


def write_hf(tiles: Tiles | None, side: int) -> tuple[str, dict[str, Any]]:
    """The model_type of transformers that computes these tiles, and the entries of its config.json that say so.

    Raises:
      ValueError: none does; the field of `Tiles` is named.
    """
    if tiles is None:
        return "llava", {}
    many = bool(tiles.max_tiles)
    wanted = {"merge": "spatial_unpad", "rounding": "round", "several": "whole" if many else "tiles"}
    for key, value in wanted.items():
        if getattr(tiles, key) != value:
            raise ValueError(
                f"transformers' LLaVA cannot compute tiles.{key}={getattr(tiles, key)!r}; it has {value!r}. Export "
                "plain safetensors or Orbax instead."
            )
    fields: dict[str, Any] = {
        "image_grid_pinpoints": [[rows * side, columns * side] for columns, rows in tiles.pinpoints],
        "use_image_newline_parameter": True,
    }
    if many:
        return "llava_onevision", {**fields, "vision_aspect_ratio": f"anyres_max_{tiles.max_tiles}"}
    return "llava_next", fields
