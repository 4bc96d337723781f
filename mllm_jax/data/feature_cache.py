"""Vision features of images on disk, for stages whose tower is frozen.

    DIR/KEY/key.json            what the features were computed with, in full
    DIR/KEY/*.features          shards: the images' digests, then their features, records of one size

`KEY` is a digest of everything in `key.json`: the tower's weights and geometry, the hidden states asked for,
resolution, preprocessing and dtype. Other values have another folder, and a folder whose `key.json` says something
else is refused, so features of another model are never read. An image is found by the digest of its bytes, a tile by
that of its image and its place, so that one image in many samples, sources or stages is kept once. Shards appear only
when they are complete: what a killed run has written so far is used.
"""

import hashlib
import json
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
      shape: of one image's features, [F, N, C].
      dtype: of them.
      directory: of this key.
    """

    def __init__(self, root: str | pathlib.Path, key: dict[str, Any], shape: Sequence[int], dtype: Any):
        """Opens the folder of `key` below `root`, or makes it.

        Args:
          key: JSON-able values that decide the features.

        Raises:
          FeatureCacheError: the folder holds features of another key, or a damaged shard.
        """
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        whole = {"format": FORMAT, "shape": list(self.shape), "dtype": self.dtype.name, **key}
        text = json.dumps(whole, indent=1, sort_keys=True)
        self.directory = pathlib.Path(root) / hashlib.sha256(text.encode()).hexdigest()[:20]
        self.record = int(np.prod(self.shape)) * self.dtype.itemsize  # bytes
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
    def spec(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one image's features."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

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

    def read(self, digest: bytes) -> Shaped[np.ndarray, "F N C"]:
        """The features of an image by its digest.

        Raises:
          FeatureCacheError: they are not there.
        """
        if digest not in self._where:
            raise FeatureCacheError(f"{self.directory} has no features of an image; start the run again")
        name, offset = self._where[digest]
        count = self.record // self.dtype.itemsize
        try:
            found = np.fromfile(self.directory / name, self.dtype, count, offset=offset)
        except OSError as error:
            raise FeatureCacheError(f"{self.directory / name} cannot be read: {error}") from error
        if len(found) < count:
            raise FeatureCacheError(
                f"{self.directory / name} has become shorter; remove it and start the run again"
            )
        return found.reshape(self.shape)

    def write(self, digests: Sequence[bytes], features: Shaped[np.ndarray, "n F N C"]) -> None:
        """Adds a shard, complete or not at all."""
        if features.shape != (len(digests), *self.shape) or features.dtype != self.dtype:
            raise ValueError(
                f"features {features.shape} {features.dtype} of {len(digests)} images; "
                f"expected {self.shape} {self.dtype} each"
            )
        path = self.directory / f"{uuid.uuid4().hex}{SUFFIX}"
        with files.replacing(path) as file:
            file.write(b"".join(digests))
            file.write(np.ascontiguousarray(features).view(np.uint8).data)
