"""The samples of WebDataset tars, read as a stream."""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_jax import limits
from mllm_jax.data.foreign.layouts import FIELDS, Json
from mllm_jax.data.foreign.report import Dropped, Entry, Leave
from mllm_jax.data.reading import DataError, open_unpacked, parse_json

_IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm jp2 avif img image".split())
_OTHER_MEDIA = frozenset("mp4 avi mov mkv webm mp3 wav flac ogg m4a".split())
_TEXTS = frozenset("txt text caption".split())
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # WebDataset's: up to the first full stop of the name
_PIECE = 1 << 20  # bytes of the rest of an archive that are read at once
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, OSError)


def tar_rows(path: Path, leave: Leave) -> Iterator[Entry]:
    """The samples of an archive as rows.

    Args:
      leave: called for members that are not read.

    Raises:
      DataError: it is damaged, or holds a member that is too large.
    """
    try:
        with open_unpacked(path) as binary:
            for key, members in _samples(_Ending(binary), path, leave):
                try:
                    yield _tar_row(key, members, path, leave)
                except Dropped as dropped:
                    yield dropped
    except _DAMAGED as error:
        raise DataError(f"{path}: damaged or no tar archive: {error}") from None
    except limits.LimitError as error:
        raise DataError(str(error)) from None


class _Header(tarfile.TarInfo):
    """A header of which none is passed over: tarfile takes a damaged one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        """As that of `TarInfo`.

        Raises:
          ReadError: damaged.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


class _Ending:
    """A stream that remembers its last block: tarfile takes an archive that is cut off between two files for whole."""

    def __init__(self, binary: gzip.GzipFile | io.BufferedReader):
        self._binary, self._last = binary, b""

    def read(self, size: int) -> bytes:
        """As that of a file."""
        data = self._binary.read(size)
        self._last = (self._last + data)[-tarfile.BLOCKSIZE :]
        return data

    def check(self) -> None:
        """Reads the rest, which checks the sum of what was compressed, and raises ReadError if the end is missing."""
        while self.read(_PIECE):
            pass
        if self._last.strip(b"\0"):
            raise tarfile.ReadError("it is cut off: no empty block ends it")


def _samples(file: _Ending, path: Path, leave: Leave) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The key of each sample and its members, whose names begin with the key and stand together."""
    now, members = "", {}
    # Past empty blocks: of archives that were written one behind the other, all are read.
    options: dict[str, Any] = {"mode": "r|", "ignore_zeros": True, "tarinfo": _Header}
    with tarfile.open(fileobj=file, **options) as tar:  # type: ignore[call-overload]
        for member in tar:
            tar.members = []  # a stream is not searched again, and headers would pile up
            match = _KEY.fullmatch(member.name)
            if member.isdir():
                continue
            if not member.isreg() or match is None:
                leave("members that are no files, or without an extension", f"{path.name}: {member.name}", 1)
                continue
            key, extension = match[1], match[2].lower()
            if key != now or extension in members:
                if members:
                    yield now, members
                now, members = key, {}
            limits.check("MAX_IMAGE_FILE_BYTES", member.size, f"{path}: {member.name}")
            data = tar.extractfile(member)
            members[extension] = data.read() if data else b""
    file.check()
    if members:
        yield now, members


def _tar_row(key: str, members: dict[str, bytes], path: Path, leave: Leave) -> dict[str, Json]:
    """The row of a sample's members: what its JSON says, its text, and its images in order."""
    row: dict[str, Json] = {}
    images: dict[str, bytes] = {}
    where = f"{path.name}: {key}"
    for extension, data in members.items():
        kind = extension.rpartition(".")[2]
        if kind == "json":
            found = _parsed(data, f"{where}.{extension}")
            row |= found if isinstance(found, dict) else {"conversations": found}
        elif kind in _TEXTS and "txt" not in row:
            row["txt"] = data.decode("utf-8-sig", "surrogateescape")
        elif kind in _IMAGES:
            images[extension] = data
        elif kind in _OTHER_MEDIA:
            row["media"] = f"{key}.{extension}"
        else:
            leave(f"members .{kind}", where, 1)
    row["__key__"] = key
    if not images:  # what its JSON names lies beside the archive
        return row
    order = _named(row, key, images) or sorted(images, key=_by_number)
    if left := images.keys() - set(order):
        leave("members of images that the JSON does not name", where, len(left))
    for column in FIELDS["image"]:
        row.pop(column, None)
    row["image"] = [{"bytes": images[extension], "path": f"{key}.{extension}"} for extension in order]
    return row


def _named(row: Mapping[str, Json], key: str, images: Mapping[str, bytes]) -> list[str]:
    """The images in the order in which the sample's JSON names them; empty where it names none of them.

    Raises:
      Dropped: it names some of them, or others of another number.
    """
    given = next((row[column] for column in FIELDS["image"] if row.get(column)), None)
    names = [str(name) for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]
    of_name = {f"{PurePosixPath(key).name}.{extension}".lower(): extension for extension in images}
    of_name |= {extension: extension for extension in images}
    found = [of_name[base] for name in names if (base := PurePosixPath(name).name.lower()) in of_name]
    if len(found) < len(names) and (found or len(names) != len(images)):
        raise Dropped("missing-image", f"its JSON names {names}, and there are {sorted(of_name)}")
    return found


def _parsed(data: bytes, where: str) -> Json:
    try:
        return parse_json(data.decode("utf-8-sig"), where)
    except (DataError, UnicodeDecodeError) as error:
        raise Dropped("unreadable-line", str(error)) from None


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """A key by which 2.jpg stands before 10.jpg."""
    return [
        (not piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece)
        for piece in re.split(r"(\d+)", name)
    ]
