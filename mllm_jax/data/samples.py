"""What a data source yields: one conversation with its images and videos; and the simplest source, files in a folder.

A source is anything with `len(source)` and a thread-safe `source[i] -> Sample`: a prepared data set
(`tfds_llava.LlavaSource`), files read directly (`FolderSource`), a list of `Sample`s, a procedural world.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mllm_jax.data import llava_json
from mllm_jax.data.batch import Size
from mllm_jax.data.images import image_size
from mllm_jax.data.layout import Shown
from mllm_jax.data.reading import DataError, read_image_file, safe_path
from mllm_jax.data.video import OpenVideo, open_video, pick_encoded
from mllm_jax.data.video_layout import Video


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames that were picked of a video, each in a form that images of a `Sample` have."""

    frames: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sample with its images and videos.

    Attributes:
      id: unique in its data set.
      images: encoded image files (bytes), or decoded images as uint8 arrays [H, W, 3]; a `Clip` where a video stands.
      conversations: turns `{"from": "human" | "gpt", "value": str}`, human first.
      image_paths: where each image came from, for error messages; may be empty.
    """

    id: str
    images: tuple[Any, ...]
    conversations: tuple[dict[str, str], ...]
    image_paths: tuple[str, ...] = ()

    def image_name(self, index: int) -> str:
        """How to call an image in an error message: by its path, else by its number."""
        return self.image_paths[index] if index < len(self.image_paths) else f"image {index}"


@runtime_checkable
class Source(Protocol):
    """A data set that can be read at random, from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class FolderSource:
    """Checked records whose image and video files are read from their folder each time, without preparing anything."""

    def __init__(
        self, records: Sequence[llava_json.Record], image_root: str | Path, video: Video | None = None
    ):
        """Takes records as `llava_json.read_records` returns them.

        Args:
          image_root: the folder their paths start from.
          video: which frames of videos are picked; needed where records have some.
        """
        self._records = records
        self._root = Path(image_root)
        self._video = video

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        images = tuple(self._read(record, image) for image in range(len(record.images)))
        return Sample(record.id, images, record.conversations, record.images)

    def _read(self, record: llava_json.Record, image: int) -> bytes | Clip:
        name = record.images[image]
        if image not in record.videos:
            return read_image_file(self._root, name, record.id)
        if self._video is None:
            raise DataError(f"sample {record.id!r}: {name} is a video, and no frames are picked")
        return Clip(tuple(pick_encoded(record_video(self._root, name, record.id), *self._video.picked)))

    def __repr__(self) -> str:
        return f"FolderSource({str(self._root)!r}, samples={len(self)})"


def record_video(root: str | Path, name: str, sample_id: str) -> OpenVideo:
    """A video that a data file names.

    Args:
      root, name, sample_id: as those of an image in `read_image_file`.

    Raises:
      DataError: an unsafe path.
      VideoError, ModuleNotFoundError: as `open_video`.
    """
    try:
        path = safe_path(root, name)
    except DataError as error:
        raise DataError(f"sample {sample_id!r}: video {error}") from None
    return open_video(path, name=f"sample {sample_id!r}, {path}")


def record_shown(
    root: str | Path, record: llava_json.Record, compat: str | None, **limit: int
) -> list[Shown]:
    """What the layouts of a record's images and videos are made from; videos are counted, images read when asked for.

    Args and raises: as `record_video` and `image_file_size`.
    """
    read = functools.partial(image_file_size, root, **limit)
    return [
        record_video(root, path, record.id).total
        if place in record.videos
        else functools.partial(read, path, record.id, compat)
        for place, path in enumerate(record.images)
    ]


def image_file_size(
    root: str | Path, name: str, sample_id: str, compat: str | None = None, **limit: int
) -> Size:
    """Height and width in pixels of an image file, from its header.

    Args:
      root, name: as in `read_image_file`.
      compat, **limit: as in `images.image_size`.

    Raises:
      DataError: as `read_image_file`.
      ImageError: it is not a usable image, naming sample and path.
    """
    data = read_image_file(root, name, sample_id)
    return image_size(data, source=f"sample {sample_id!r}, {name}", compat=compat, **limit)
