"""Videos as a few of their frames: which ones, as pixels or as image files."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mllm_jax.data.images import MAX_PIXELS
from mllm_jax.data.video_file import VideoError
from mllm_jax.data.video_sources import Frame, OpenVideo, Segment, open_video

__all__ = [
    "SAMPLINGS",
    "OpenVideo",
    "Segment",
    "VideoError",
    "frame_numbers",
    "num_frames",
    "open_video",
    "pick",
    "pick_encoded",
    "read_frames",
]


def _middles(total: int, count: int) -> list[int]:
    """Python rounds halves to even, as the originals do."""
    length = (total - 1) / count
    return [(round(length * i) + round(length * (i + 1))) // 2 for i in range(count)]


def _spread(total: int, count: int) -> list[int]:
    return [int(place) for place in np.linspace(0, total - 1, count)]


# "segments": the middle of each of `count` equal parts (Video-ChatGPT, FreeVA, Dense Connector). "linspace": from the
# first frame to the last (LLaVA-NeXT, LLaVA-OneVision).
SAMPLINGS: dict[str, Callable[[int, int], list[int]]] = {"segments": _middles, "linspace": _spread}


def frame_numbers(total: int, count: int, sampling: str = "segments") -> list[int]:
    """The numbers of the frames that are picked of a video: `count`, or all that there are; some may repeat.

    >>> frame_numbers(100, 8)
    [6, 18, 31, 43, 56, 68, 80, 93]

    Args:
      total: frames of the video, 1 or more.
      count: frames that are wanted, 1 or more.
      sampling: one of `SAMPLINGS`.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling {sampling!r} is none of {', '.join(SAMPLINGS)}")
    if total < 1 or count < 1:
        raise ValueError(f"{count} of {total} frames: both must be at least 1")
    return SAMPLINGS[sampling](total, min(total, count))


def num_frames(source: Any, segment: Segment | None = None, *, name: str = "") -> int:
    """Frames of a video, or of a segment of it; nothing is decoded. Args and raises: as `open_video`."""
    return open_video(source, segment, name=name).total


def read_frames(
    source: Any,
    count: int,
    sampling: str = "segments",
    *,
    segment: Segment | None = None,
    name: str = "",
    compat: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Frame]:
    """The picked frames of a video, in their order; fewer than `count` where it has fewer.

    Memory holds these frames and a few that the decoder needs.

    Examples:
      >>> frames = read_frames("clip.mp4", 4)
      >>> len(frames), frames[0].dtype, frames[0].ndim
      (4, dtype('uint8'), 3)

    Args:
      source, segment, name: as in `open_video`.
      count: frames that are wanted.
      sampling: which ones; see `SAMPLINGS`.
      compat, max_pixels: of images in a folder, as in `images.decode_image`; `max_pixels` of other frames too.

    Raises:
      VideoError, ImageError: it cannot be used (no such file, empty, without a video, cut off, damaged, too large);
        names the file.
      ModuleNotFoundError: PyAV is not installed, and a file was given.
      TypeError: no form of a video.
    """
    video = open_video(source, segment, name=name)
    return pick(video, count, sampling, compat=compat, max_pixels=max_pixels)


def pick(
    video: OpenVideo,
    count: int,
    sampling: str = "segments",
    *,
    compat: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[Frame]:
    """The picked frames of an open video; args and raises: as `read_frames`."""
    return video.frames(frame_numbers(video.total, count, sampling), compat, max_pixels)


def pick_encoded(
    video: OpenVideo, count: int, sampling: str = "segments", *, max_pixels: int = MAX_PIXELS
) -> list[bytes]:
    """The same as image files: those of a folder as they are, others as PNG. Args and raises: as `read_frames`."""
    return video.encoded(frame_numbers(video.total, count, sampling), max_pixels)
