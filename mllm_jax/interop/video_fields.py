"""How published checkpoints say that they read videos, read and written.

Sources: transformers' `llava_onevision`; LLaVA-VL/LLaVA-NeXT `llava/model/llava_arch.py` (`get_2dPool`,
`prepare_inputs_labels_for_multimodal`) and `llava/train/train.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mllm_jax.data.video_layout import NEWLINES, Video

FRAMES = 32  # no config.json says how many; OneVision was trained on at most so many
ONEVISION = Video(FRAMES, "linspace", "bilinear2d", newline="one_token")
_POOLS = {"average": "average2d", "max": "max2d", "bilinear": "bilinear2d"}
KEYS = ("mm_spatial_pool_mode", "mm_spatial_pool_stride", "mm_newline_position")


def read_hf(kind: str) -> Video | None:
    """How a model_type of transformers' LLaVA classes reads videos; None where it reads none."""
    return ONEVISION if kind == "llava_onevision" else None


def read_llava(fields: Mapping[str, Any], where: str, newline: bool) -> Video | None:
    """How LLaVA-NeXT's own config.json says that videos are read; None where it names no pool.

    Args:
      fields: of config.json.
      where: the file, for messages.
      newline: whether the checkpoint has a learned newline.

    Raises:
      ValueError: naming the entry.
    """
    mode, stride, position = (fields.get(key) for key in KEYS)
    stride, position = 2 if stride is None else stride, position or "one_token"
    for key, value, fits, supported in (
        (KEYS[0], mode, not mode or (isinstance(mode, str) and mode in _POOLS), ", ".join(_POOLS)),
        (KEYS[1], stride, type(stride) is int and 0 < stride <= 1024, "a positive whole number"),
        (KEYS[2], position, position in NEWLINES, ", ".join(NEWLINES)),
    ):
        if not fits:
            raise ValueError(f"{where}: {key}={value!r} is not supported; supported: {supported}")
    if not mode:
        return None
    if not newline:
        if position in ("grid", "frame"):
            raise ValueError(
                f"{where}: {KEYS[2]}={position!r} needs the learned newline of mm_patch_merge_type='spatial_unpad'"
            )
        position = "no_token"
    pool = {"pool": _POOLS[mode], "window": stride} if stride > 1 else {"pool": "none"}
    return Video(FRAMES, "linspace", newline=position, **pool)


def write_llava(video: Video | None) -> dict[str, Any]:
    """The entries that `read_llava` reads; {} for what LLaVA's config.json does not say.

    It knows neither how many frames there are nor Dense Connector's pool, which its scripts are told.
    """
    modes = {pool: mode for mode, pool in _POOLS.items()} | {"none": "average"}
    if video is None or video.time != "concat" or video.pool not in modes:
        return {}
    stride = 1 if video.pool == "none" else video.window
    return dict(zip(KEYS, (modes[video.pool], stride, video.newline), strict=True))


def unsaid(video: Video | None, read: Video | None) -> dict[str, Any]:
    """What an export does not say of how its model reads videos.

    Args:
      video: of the model.
      read: of the export, read again.

    Returns:
      Keys of `model.video` with the model's values.
    """
    given = {} if video is None else dataclasses.asdict(video)
    if video is not None and video.pool == "none":
        del given["window"]
    return {key: value for key, value in given.items() if read is None or getattr(read, key) != value}
