"""What a video is read from: a file, a folder of images, an array or a list of images; or a segment of one."""

import dataclasses
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mllm_jax.data.images import decode_image
from mllm_jax.data.reading import DataError, read_image_file
from mllm_jax.data.video_file import VideoError, VideoIndex, decode_frames, video_index

Frame = UInt8[np.ndarray, "h w 3"]
Segment = tuple[int | float, int | float]  # from where to where: whole numbers count frames, others seconds
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2", ".avif")
_COMPRESSION = 1  # of PNG; more takes several times as long for a tenth


@runtime_checkable
class OpenVideo(Protocol):
    """A video whose frames are counted.

    Attributes:
      name: what messages call it.
      total: frames.
      rate: frames a second, on average; None where it is not known.
    """

    @property
    def name(self) -> str: ...

    @property
    def total(self) -> int: ...

    @property
    def rate(self) -> float | None: ...

    def frames(self, numbers: Sequence[int], compat: str | None, max_pixels: int) -> list[Frame]:
        """The frames with these numbers, which may repeat; see `video.read_frames`."""
        ...

    def encoded(self, numbers: Sequence[int], max_pixels: int) -> list[bytes]:
        """The same as image files."""
        ...


def open_video(source: Any, segment: Segment | None = None, *, name: str = "") -> OpenVideo:
    """A video, with its frames counted and none of them decoded.

    Args:
      source: a video file, a folder of images (sorted by their names, numbers in them by value), an array
        uint8[n, h, w, 3], or a list of PIL images or arrays.
      segment: only this part; (18, 166) are the frames from 18 to before 166, (1.2, 11.1) are seconds.
      name: what messages call it; "" = its path.

    Raises:
      VideoError: it cannot be used; names the file.
      ModuleNotFoundError: PyAV is not installed, and a file was given.
      TypeError: no form of a video.
    """
    video = _open(source, name)
    return video if segment is None else _Part(video, _numbers(video, segment))


def _open(source: Any, name: str) -> OpenVideo:
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        name = name or str(path)
        if os.path.isdir(path):  # False also for a name that cannot be one
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


def _numbers(video: OpenVideo, segment: Segment) -> range:
    """The numbers of the frames of a segment, at least one of which is there."""
    first, last = segment
    if not all(isinstance(each, int) for each in segment):
        if video.rate is None:
            raise VideoError(
                f"{video.name}: seconds {first} to {last} of a video that does not say how many frames a second has; "
                "give the segment in frames (whole numbers)"
            )
        first, last = (int(min(max(each * video.rate, 0), video.total - 1)) for each in segment)
    found = range(video.total)[first:last]
    if not found or first < 0:
        raise VideoError(
            f"{video.name}: no frame in the segment {segment[0]} to {segment[1]}; it has {video.total}"
        )
    return found


class _Decoded:
    """A video whose frames have no files of their own."""

    def encoded(self: Any, numbers: Sequence[int], max_pixels: int) -> list[bytes]:
        different = list(dict.fromkeys(numbers))
        files = dict(zip(different, map(_as_png, self.frames(different, None, max_pixels)), strict=True))
        return [files[number] for number in numbers]


def _as_png(pixels: Frame) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_COMPRESSION)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class _File(_Decoded):
    path: Path
    index: VideoIndex

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def total(self) -> int:
        return self.index.total

    @property
    def rate(self) -> float | None:
        return self.index.rate

    def frames(self, numbers: Sequence[int], compat: str | None, max_pixels: int) -> list[Frame]:
        return decode_frames(self.path, self.index, numbers, max_pixels)


@dataclasses.dataclass(frozen=True)
class _Images(_Decoded):
    name: str
    images: Any  # an array, a list or a tuple
    rate: None = None

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


@dataclasses.dataclass(frozen=True)
class _Folder:
    name: str
    files: tuple[Path, ...]
    rate: None = None

    @property
    def total(self) -> int:
        return len(self.files)

    def frames(self, numbers: Sequence[int], compat: str | None, max_pixels: int) -> list[Frame]:
        def decoded(number: int) -> Frame:
            source = f"{self.name}, frame {self.files[number].name}"
            return decode_image(self._read(number), source=source, compat=compat, max_pixels=max_pixels)

        found = {number: decoded(number) for number in dict.fromkeys(numbers)}
        return [found[number] for number in numbers]

    def encoded(self, numbers: Sequence[int], max_pixels: int) -> list[bytes]:
        return [self._read(number) for number in numbers]

    def _read(self, number: int) -> bytes:
        file = self.files[number]
        try:
            return read_image_file(file.parent, file.name, "")
        except DataError as error:
            said = str(error).removeprefix("sample '': ")
            raise VideoError(f"{self.name}: {said}") from error


@dataclasses.dataclass(frozen=True)
class _Part:
    """A segment of a video."""

    whole: OpenVideo
    numbers: range

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def total(self) -> int:
        return len(self.numbers)

    @property
    def rate(self) -> float | None:
        return self.whole.rate

    def frames(self, numbers: Sequence[int], compat: str | None, max_pixels: int) -> list[Frame]:
        return self.whole.frames([self.numbers[number] for number in numbers], compat, max_pixels)

    def encoded(self, numbers: Sequence[int], max_pixels: int) -> list[bytes]:
        return self.whole.encoded([self.numbers[number] for number in numbers], max_pixels)


def frame_files(folder: Path, name: str = "") -> tuple[Path, ...]:
    """The images of a folder of frames in their order: `2.jpg` before `10.jpg`. Other files are left out.

    Raises:
      VideoError: there are none.
    """
    name = name or str(folder)
    try:
        files = [
            file
            for file in folder.iterdir()
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
    except OSError as error:
        raise VideoError(f"{name}: the folder cannot be read: {error.strerror}") from error
    if not files:
        raise VideoError(f"{name}: no frames in the folder; they end in {', '.join(IMAGE_SUFFIXES)}")
    return tuple(sorted(files, key=lambda file: (_natural(file.name), file.name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in a name by their value."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in parts if part]
