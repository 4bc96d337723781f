"""Images and videos of converted samples: found, decoded once, and stored as they are under names of their contents.

A name is a digest of the bytes, so that the same image is stored once, no name leads out of the folder, and several
processes need not agree on anything.
"""

import base64
import binascii
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_jax import files, limits
from mllm_jax.data.foreign.report import Dropped
from mllm_jax.data.images import ImageError, image_suffix, open_rgb
from mllm_jax.data.reading import DataError, is_safe_name, read_image_file, safe_path

_KNOWN = 1 << 16  # names that are remembered, so that an image of many samples is read once
_DATA_URI = re.compile(r"data:[\w/+.;=-]*;base64,")
_REMOTE = re.compile(r"(?i)(https?|ftp|s3|gs|hf)://")
_PIECE = 1 << 20  # bytes of a video that are read at once


class MediaStore:
    """Stores media below a folder.

    Attributes:
      folder: where they go.
      root: where paths start from.
      max_pixels: an image with more is refused.
    """

    def __init__(self, folder: Path, root: Path, max_pixels: int):
        self.folder, self.root, self.max_pixels = folder, root, max_pixels
        self._known: dict[str, str | Dropped] = {}

    def image(self, given: Any, sample: str) -> str:
        """The name below the folder under which an image is stored.

        Args:
          given: bytes, {"bytes", "path"}, a path below `root` or a data URI.
          sample: id of the sample that shows it, for messages.

        Raises:
          Dropped: it cannot be used.
        """
        if isinstance(given, Mapping):
            given = given.get("bytes") or given.get("path") or given.get("url")
        if isinstance(given, str):
            if match := _DATA_URI.match(given):
                return self._stored(_decoded(given[match.end() :]), sample)
            return self._once(f"image {given}", lambda: self._stored(self._read(given, sample), sample))
        if isinstance(given, bytes):
            return self._stored(given, sample)
        raise Dropped("missing-image", f"an image is {'not there' if given is None else repr(given)[:80]}")

    def video(self, given: Any) -> str:
        """The name below the folder under which a video file is stored.

        Args:
          given: a path below `root`, or {"path"}.

        Raises:
          Dropped: it cannot be used.
        """
        name = given.get("path") or given.get("url") if isinstance(given, Mapping) else given
        if not isinstance(name, str):
            raise Dropped("missing-video", f"a video is no path: {given!r:.80}")
        return self._once(f"video {name}", lambda: self._copied(name))

    def _once(self, name: str, store: Any) -> str:
        """What `store` gives for an image or video of a name, remembered, also if it is a fault."""
        if name not in self._known:
            if len(self._known) >= _KNOWN:
                self._known.pop(next(iter(self._known)))
            try:
                self._known[name] = store()
            except Dropped as dropped:
                self._known[name] = dropped
        found = self._known[name]
        if isinstance(found, Dropped):
            raise Dropped(found.kind, found.message)
        return found

    def _relative(self, name: str, kind: str) -> str:
        """A path below the root; absolute ones may lead there, too."""
        if _REMOTE.match(name):
            raise Dropped(
                "remote-image" if kind == "image" else "missing-video",
                f"{name!r:.200} is not on this machine",
            )
        path = PurePosixPath(name.removeprefix("file://"))
        if path.is_absolute() and path.is_relative_to(self.root):
            path = path.relative_to(self.root)
        if not is_safe_name(str(path)):
            raise Dropped(f"{kind}-path", f"{name!r:.200} is not below the folder {self.root} (--images)")
        return str(path)

    def _read(self, name: str, sample: str) -> bytes:
        name = self._relative(name, "image")
        if not os.path.exists(self.root / name):
            raise Dropped("missing-image", f"{self.root / name} does not exist (--images)")
        try:
            return read_image_file(self.root, name, sample)
        except DataError as error:
            raise Dropped("unusable-image", str(error)) from None

    def _stored(self, data: bytes, sample: str) -> str:
        digest = hashlib.sha256(data).hexdigest()[:32]
        if digest in self._known:
            return self._once(digest, None)
        try:
            limits.check("MAX_IMAGE_FILE_BYTES", len(data), f"sample {sample!r}: an image")
            open_rgb(data, source=f"sample {sample!r}", max_pixels=self.max_pixels)
            suffix = image_suffix(data, source=sample)
        except (ImageError, limits.LimitError) as error:
            raise Dropped("unusable-image", str(error)) from None
        return self._once(digest, lambda: self._written(f"{digest[:2]}/{digest}{suffix}", data))

    def _written(self, name: str, data: bytes) -> str:
        target = self.folder / name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(target, sync=False) as file:
                file.write(data)
        return name

    def _copied(self, name: str) -> str:
        try:
            path = safe_path(self.root, self._relative(name, "video"))
            if not path.is_file():
                raise Dropped("missing-video", f"{path} is no file that is there (--images)")
            with path.open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()[:32]
                suffix = re.sub(r"[^.\w]", "", path.suffix.lower())
                target = self.folder / "videos" / f"{digest}{suffix}"
                if not target.is_file():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source.seek(0)
                    with files.replacing(target, sync=False) as file:
                        shutil.copyfileobj(source, file, _PIECE)
        except OSError as error:
            raise Dropped("missing-video", f"{name}: {error.strerror or error}") from None
        return f"videos/{target.name}"


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Dropped("unusable-image", f"a data URI is no base64: {error}") from None
