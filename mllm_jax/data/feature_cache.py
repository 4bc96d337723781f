"""Vision features of images on disk, for stages whose tower is frozen.

    DIR/KEY/key.json            what the features were computed with, in full
    DIR/KEY/*.features          shards: the images' digests, then their features, records of one size

A record is one array [F, N, C] for every grid of features (`models.features`), one behind the other.

`KEY` is a digest of everything in `key.json`: the tower's weights and geometry, the hidden states asked for,
resolution, preprocessing and dtype. Other values have another folder, and a folder whose `key.json` says something
else is refused, so features of another model are never read. An image is found by the digest of its bytes, a tile by
that of its image and its place, so that one image in many samples, sources or stages is kept once. Shards appear only
when they are complete: what a killed run has written so far is used.
"""

import hashlib
import json
import math
import pathlib
import uuid
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from mllm_jax import files
from mllm_jax.data.layout import VisualLayout
from mllm_jax.data.reading import DataError, read_json
from mllm_jax.data.samples import Clip

FORMAT = 1  # raise when what is written changes
DIGEST = 32  # bytes
SUFFIX = ".features"


class FeatureCacheError(DataError):
    """A feature cache that cannot be used; the message names the file and the fix."""


def digest(image: Any) -> bytes:
    """Under which an image's features are kept: a digest of its encoded bytes, or of its pixels if it is decoded."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    pixels = np.ascontiguousarray(image)
    return hashlib.sha256(f"{pixels.shape} {pixels.dtype}\n".encode() + pixels.tobytes()).digest()


def digests(image: Any, layout: VisualLayout) -> list[bytes]:
    """The digest of every slot of an image or video."""
    if isinstance(image, Clip):
        return [digest(frame) for frame in image.frames]
    whole = digest(image)
    if layout.canvas is None:
        return [whole]
    cut = f"{layout.canvas} {len(layout.slots)}"
    return [hashlib.sha256(whole + f"{cut} {slot}".encode()).digest() for slot in range(len(layout.slots))]


class FeatureCache:
    """The features computed with one key.

    Safe to read from several threads and to send to worker processes.

    Attributes:
      spec: shape [F, N, C] and dtype of every array of one image's features.
      directory: of this key.
    """

    def __init__(self, root: str | pathlib.Path, key: dict[str, Any], spec: Sequence[jax.ShapeDtypeStruct]):
        """Opens the folder of `key` below `root`, or makes it.

        Args:
          key: JSON-able values that decide the features.
          spec: as the attribute; all of one dtype.

        Raises:
          FeatureCacheError: the folder holds features of another key, or a damaged shard.
        """
        self.spec = tuple(spec)
        first, *others = ([*each.shape] for each in self.spec)
        whole = {"format": FORMAT, "shape": first, "dtype": self.dtype.name, **key}
        whole |= {"maps": others} if others else {}
        text = json.dumps(whole, indent=1, sort_keys=True)
        self.directory = pathlib.Path(root) / hashlib.sha256(text.encode()).hexdigest()[:20]
        self._sizes = [math.prod(each.shape) for each in self.spec]
        self.record = sum(self._sizes) * self.dtype.itemsize  # bytes
        self._where: dict[bytes, tuple[str, int]] = {}  # digest -> (shard, offset)
        self._seen: set[str] = set()
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "key.json"
        if not path.exists():
            files.write_text(path, text)
        elif read_json(path) != json.loads(text):
            raise FeatureCacheError(f"{path} is not the key of these features; move {self.directory} away")
        self.refresh()

    def __len__(self) -> int:
        return len(self._where)

    @property
    def dtype(self) -> np.dtype:
        """Of all features."""
        return np.dtype(self.spec[0].dtype)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._where

    def refresh(self) -> None:
        """Takes up the shards that have been written since, by this process or another.

        Raises:
          FeatureCacheError: a shard whose size is not that of whole records.
        """
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            if path.name in self._seen:
                continue
            count, rest = divmod(path.stat().st_size, DIGEST + self.record)
            if rest or not count:
                raise FeatureCacheError(f"{path} is damaged; remove it, and its features are computed again")
            with path.open("rb") as file:
                digests = file.read(count * DIGEST)
            for index in range(count):
                image = digests[index * DIGEST : (index + 1) * DIGEST]
                self._where[image] = (path.name, count * DIGEST + index * self.record)
            self._seen.add(path.name)

    def read(self, digest: bytes) -> tuple[Shaped[np.ndarray, "_ _ _"], ...]:
        """The features of an image by its digest.

        Raises:
          FeatureCacheError: they are not there.
        """
        if digest not in self._where:
            raise FeatureCacheError(f"{self.directory} has no features of an image; start the run again")
        name, offset = self._where[digest]
        count = sum(self._sizes)
        try:
            found = np.fromfile(self.directory / name, self.dtype, count, offset=offset)
        except OSError as error:
            raise FeatureCacheError(f"{self.directory / name} cannot be read: {error}") from error
        if len(found) < count:
            raise FeatureCacheError(
                f"{self.directory / name} has become shorter; remove it and start the run again"
            )
        arrays = np.split(found, np.cumsum(self._sizes[:-1]))
        return tuple(array.reshape(each.shape) for array, each in zip(arrays, self.spec, strict=True))

    def write(self, digests: Sequence[bytes], features: Sequence[Shaped[np.ndarray, "n _ _ _"]]) -> None:
        """Adds a shard, complete or not at all.

        Args:
          features: of all images, an array for every one of `spec`.
        """
        count = len(digests)
        for array, each in zip(features, self.spec, strict=True):
            if array.shape != (count, *each.shape) or array.dtype != each.dtype:
                raise ValueError(
                    f"features {array.shape} {array.dtype} of {count} images; expected {each.shape} {each.dtype} each"
                )
        records = np.concatenate([array.reshape(count, -1) for array in features], axis=1)
        path = self.directory / f"{uuid.uuid4().hex}{SUFFIX}"
        with files.replacing(path) as file:
            file.write(b"".join(digests))
            file.write(np.ascontiguousarray(records).view(np.uint8).data)
