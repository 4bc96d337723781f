"""Videos as a few of their frames: which ones, and from what they are read."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mllm_jax.data.images import MAX_PIXELS, decode_image
from mllm_jax.data.video_file import VideoError, VideoIndex, decode_frames, video_index

__all__ = ["SAMPLINGS", "Segment", "VideoError", "frame_numbers", "num_frames", "read_frames"]

Frame = UInt8[np.ndarray, "h w 3"]
Source = Any  # a file or folder of frames by its path, an array [n, h, w, 3], or a list of images
Segment = tuple[int | float, int | float]  # from where to where: whole numbers count frames, others seconds
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif")


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


def num_frames(source: Source, segment: Segment | None = None) -> int:
    """Frames of a video, or of a segment of it; nothing is decoded.

    Raises:
      VideoError: it cannot be used; names the file.
      ModuleNotFoundError: PyAV is not installed, and a file was given.
    """
    return len(_segment(_open(source), segment))


def read_frames(
    source: Source,
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

    Example:
        frames = read_frames("clip.mp4", 8)

    Args:
      source: a video file, a folder of images (sorted by their names, numbers in them by value), an array
        uint8[n, h, w, 3], or a list of PIL images or arrays.
      count: frames that are wanted.
      sampling: which ones; see `SAMPLINGS`.
      segment: read only this part; (18, 166) are the frames from 18 to before 166, (1.2, 11.1) are seconds.
      name: what messages call it; "" = its path.
      compat, max_pixels: of images in a folder, as in `images.decode_image`; `max_pixels` of other frames too.

    Raises:
      VideoError, ImageError: it cannot be used (no such file, empty, without a video, cut off, damaged, too large);
        names the file.
      ModuleNotFoundError: PyAV is not installed, and a file was given.
    """
    video = _open(source, name)
    part = _segment(video, segment)
    picked = [part[number] for number in frame_numbers(len(part), count, sampling)]
    return video.frames(picked, compat, max_pixels)


def _segment(video: "_File | _Folder | _Images", segment: Segment | None) -> range:
    """The numbers of the frames of a segment, at least one of which is there."""
    if segment is None:
        return range(video.total)
    first, last = segment
    if not all(isinstance(each, int) for each in segment):
        rate = video.index.rate if isinstance(video, _File) else None
        if rate is None:
            raise VideoError(
                f"{video.name}: seconds {first} to {last} of a video that does not say how many frames a second has; "
                "give the segment in frames (whole numbers)"
            )
        first, last = (min(int(max(each * rate, 0)), video.total - 1) for each in segment)
    found = range(video.total)[first:last]
    if not found or first < 0:
        raise VideoError(
            f"{video.name}: no frame in the segment {segment[0]} to {segment[1]}; it has {video.total}"
        )
    return found


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    index: VideoIndex

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def total(self) -> int:
        return self.index.total

    def frames(self, numbers: Sequence[int], compat: str | None, max_pixels: int) -> list[Frame]:
        return decode_frames(self.path, self.index, numbers, max_pixels)


@dataclasses.dataclass(frozen=True)
class _Folder:
    name: str
    files: tuple[Path, ...]

    @property
    def total(self) -> int:
        return len(self.files)

    def frames(self, numbers: Sequence[int], compat: str | None, max_pixels: int) -> list[Frame]:
        found = {}
        for number in sorted(set(numbers)):
            file = self.files[number]
            try:
                data = file.read_bytes()
            except OSError as error:
                raise VideoError(
                    f"{self.name}: frame {file.name} cannot be read: {error.strerror}"
                ) from error
            source = f"{self.name}, frame {file.name}"
            found[number] = decode_image(data, source=source, compat=compat, max_pixels=max_pixels)
        return [found[number] for number in numbers]


@dataclasses.dataclass(frozen=True)
class _Images:
    name: str
    images: Sequence[Any]

    @property
    def total(self) -> int:
        return len(self.images)

    def frames(self, numbers: Sequence[int], compat: str | None, max_pixels: int) -> list[Frame]:
        return [self._pixels(number, max_pixels) for number in numbers]

    def _pixels(self, number: int, max_pixels: int) -> Frame:
        image = self.images[number]
        pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise VideoError(
                f"{self.name}: frame {number} is an array {pixels.dtype}{list(pixels.shape)}; a frame is "
                "uint8[h, w, 3], RGB from 0 to 255"
            )
        if pixels.shape[0] * pixels.shape[1] > max_pixels:
            raise VideoError(f"{self.name}: frame {number} has more pixels than the limit of {max_pixels}")
        return pixels


def _open(source: Source, name: str = "") -> _File | _Folder | _Images:
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        name = name or str(path)
        if path.is_dir():
            return _Folder(name, frame_files(path, name))
        return _File(path, video_index(path, name))
    name = name or "video"
    if isinstance(source, np.ndarray) and source.ndim != 4:
        raise VideoError(
            f"{name} is an array {source.dtype}{list(source.shape)}; a video is uint8[n, h, w, 3]"
        )
    if not isinstance(source, np.ndarray | list | tuple):
        raise TypeError(
            f"{name} is a {type(source).__name__}; give the path of a file or folder, an array uint8[n, h, w, 3] or "
            "a list of images"
        )
    if not len(source):
        raise VideoError(f"{name} has no frames")
    return _Images(name, source)


def frame_files(folder: Path, name: str = "") -> tuple[Path, ...]:
    """The images of a folder of frames in their order: `2.jpg` before `10.jpg`. Other files are left out.

    Raises:
      VideoError: there are none.
    """
    try:
        files = [
            file
            for file in folder.iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
    except OSError as error:
        raise VideoError(f"{name or folder}: the folder cannot be read: {error.strerror}") from error
    if not files:
        raise VideoError(
            f"{name or folder}: no frames in the folder; they end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return tuple(sorted(files, key=lambda file: (_natural(file.name), file.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in a name by their value."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in parts if part]
