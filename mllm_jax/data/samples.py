"""What a data source yields: one conversation with its images; and the simplest source, files in a folder.

A source is anything with `len(source)` and a thread-safe `source[i] -> Sample`: a prepared data set
(`tfds_llava.LlavaSource`), files read directly (`FolderSource`), a list of `Sample`s, a procedural world.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mllm_jax.data import llava_json
from mllm_jax.data.batch import Size
from mllm_jax.data.images import image_size
from mllm_jax.data.reading import read_image_file


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sample with its images.

    Attributes:
      id: unique in its data set.
      images: encoded image files (bytes), or decoded images as uint8 arrays [H, W, 3].
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
    """Checked records whose image files are read from their folder each time, without preparing anything."""

    def __init__(self, records: Sequence[llava_json.Record], image_root: str | Path):
        """Takes records as `llava_json.read_records` returns them, and the folder their paths start from."""
        self._records = records
        self._root = Path(image_root)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        images = tuple(read_image_file(self._root, image, record.id) for image in record.images)
        return Sample(record.id, images, record.conversations, record.images)

    def __repr__(self) -> str:
        return f"FolderSource({str(self._root)!r}, samples={len(self)})"


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
