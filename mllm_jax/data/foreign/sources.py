"""The rows of Parquet files, WebDataset tars and JSON files, one after the other, in parts that can be read alone.

Nothing is read whole: Parquet a batch of rows at a time, tars as a stream, JSON value by value.
"""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_jax import limits
from mllm_jax.data.foreign.layouts import FIELDS
from mllm_jax.data.foreign.report import Dropped
from mllm_jax.data.reading import DataError, parse_json

Json = Any
Rows = Iterator[tuple[int, "dict[str, Json] | Dropped"]]  # each with its number in its file
Leave = Callable[[str, str, int], None]
Binary = gzip.GzipFile | io.BufferedReader

# kind -> how the names of its files end; of a folder the first kind that it has is read
ENDINGS: dict[str, tuple[str, ...]] = {
    "WebDataset": (".tar", ".tar.gz", ".tgz"),
    "Parquet": (".parquet",),
    "JSON": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
}
_SPLIT = re.compile(r"(?i)(?:^|[-_.])(train|test|val|validation|dev)(?=[-_.]|$)")
_LOOKED_AT = 100  # rows whose columns are taken for those of the data set, where only rows tell
_BATCH = 16  # rows of Parquet that are in memory together: each may hold several images
_CHUNK = 500  # entries of JSON of a part
_READ = 1 << 20  # characters of JSON that are read at once
_LONGEST = 1 << 28  # characters of one JSON value
_IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm jp2 avif img image".split())
_OTHER_MEDIA = frozenset("mp4 avi mov mkv webm mp3 wav flac ogg m4a".split())
_TEXTS = frozenset("txt text caption".split())
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # WebDataset's: up to the first full stop of the name
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, OSError)


@dataclasses.dataclass(frozen=True)
class Part:
    """What is converted at once, in a process of its own.

    Attributes:
      path: the file.
      kind: of the file, a key of `ENDINGS`.
      name: of the file below the data set's folder, without its ending.
      key: a digest that tells it from other parts, and the same file from a changed one.
      group: the row group of a Parquet file.
      first: number of its first row in the file.
      entries: of JSON.
    """

    path: Path
    kind: str
    name: str
    key: str
    group: int = 0
    first: int = 0
    entries: "tuple[dict[str, Json] | Dropped, ...]" = ()


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a data set, all of one kind.

    Attributes:
      root: the folder.
      kind: a key of `ENDINGS`.
      paths: in order.
      left: files of other kinds in the folder.
    """

    root: Path
    kind: str
    paths: tuple[Path, ...]
    left: tuple[Path, ...] = ()


def find(source: Path, pattern: str | None = None) -> Files:
    """The files of a data set.

    Args:
      source: one file, or a folder that holds them, at any depth.
      pattern: of the names of files in the folder.

    Raises:
      DataError: there are none, or they are several splits.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    root = source.parent if source.is_file() else source
    found_paths = [source] if source.is_file() else sorted(source.rglob(pattern or "*"))
    paths = [path for path in found_paths if path.is_file() and not _hidden(path.relative_to(root))]
    kinds = {
        kind: [path for path in paths if path.name.lower().endswith(ends)] for kind, ends in ENDINGS.items()
    }
    kind = next((kind for kind, found in kinds.items() if found), None)
    if kind is None:
        ends = ", ".join(end for each in ENDINGS.values() for end in each)
        raise DataError(
            f"{source}: holds no file that ends in {ends}" + (f" and fits {pattern}" if pattern else "")
        )
    splits = {_split(path.relative_to(root)) for path in kinds[kind]} - {""}
    if len(splits) > 1:
        one = min(splits, key=lambda split: split != "train")
        pattern = f"{one}*" if any(path.name.lower().startswith(one) for path in kinds[kind]) else f"*{one}*"
        raise DataError(
            f"{source}: holds the splits {', '.join(sorted(splits))}; choose one, for example --files '{pattern}', or "
            "the folder of one as --source"
        )
    left = tuple(path for other, found in kinds.items() if other != kind for path in found)
    return Files(root, kind, tuple(kinds[kind]), left)


def _split(path: Path) -> str:
    """The split that the name of a file says, or of the folder that it is in; "" for none."""
    found = (_SPLIT.search(name) for name in reversed(path.parts))
    return next((match[1].lower() for match in found if match), "")


def _hidden(path: Path) -> bool:
    """Whether a path or a folder of it begins with a full stop: caches of downloads, unfinished work."""
    return any(part.startswith(".") for part in path.parts)


def columns(files: Files) -> list[str]:
    """The columns of the first rows, by which their layout is recognized.

    Raises:
      DataError: there is no row.
    """
    path = files.paths[0]
    if files.kind == "Parquet":
        return _parquet(path).schema_arrow.names
    for part in parts(dataclasses.replace(files, paths=(path,))):
        first = itertools.islice(rows(part, frozenset(), lambda *_: None), _LOOKED_AT)
        found = [key for _, row in first if not isinstance(row, Dropped) for key in row]
        if found:
            return list(dict.fromkeys(found))
    raise DataError(f"{path}: holds no rows")


def parts(files: Files) -> Iterator[Part]:
    """The parts of a data set, in order.

    Raises:
      DataError: a file that cannot be read.
    """
    for path in files.paths:
        status = path.stat()
        name = path.relative_to(files.root).as_posix()
        stamp = (name, status.st_size, status.st_mtime_ns)
        short = name[: -max(len(end) for end in ENDINGS[files.kind] if name.lower().endswith(end))]

        def part(
            number: int, path: Path = path, short: str = short, stamp: tuple = stamp, **more: Any
        ) -> Part:
            key = hashlib.sha256(repr((*stamp, number)).encode()).hexdigest()[:20]
            return Part(path, files.kind, short, key, **more)

        if files.kind == "Parquet":
            first, metadata = 0, _parquet(path).metadata
            for group in range(metadata.num_row_groups):
                yield part(group, group=group, first=first)
                first += metadata.row_group(group).num_rows
        elif files.kind == "WebDataset":
            yield part(0)
        else:
            entries = _entries(path)
            for first in itertools.count(0, _CHUNK):
                chunk = tuple(itertools.islice(entries, _CHUNK))
                if not chunk:
                    break
                yield part(first, first=first, entries=chunk)


def rows(part: Part, wanted: frozenset[str], leave: Leave) -> Rows:
    """The rows of a part, or why one is left out.

    Args:
      wanted: columns that are read of a Parquet file.
      leave: called with a name, where it was and how often, for what is not read.

    Raises:
      DataError: the file cannot be read.
    """
    if part.kind == "Parquet":
        return _parquet_rows(part, wanted, leave)
    if part.kind == "WebDataset":
        return _tar_rows(part, leave)
    return iter(enumerate(part.entries, part.first))


# ------------------------------------------------------------------------------------------------ Parquet
def _parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered: without, a whole row group's compressed bytes would be read first.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or no Parquet file: {error}") from None


def _parquet_rows(part: Part, wanted: frozenset[str], leave: Leave) -> Rows:
    import pyarrow as pa

    file, number = _parquet(part.path), part.first
    names = file.schema_arrow.names
    for name in names:
        if name not in wanted:
            leave(name, part.name, file.metadata.row_group(part.group).num_rows)
    columns = [name for name in names if name in wanted]
    try:
        for batch in file.iter_batches(_BATCH, row_groups=[part.group], columns=columns, use_threads=False):
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{part.path}: row group {part.group} is damaged: {error}") from None
    finally:
        file.close()


# ------------------------------------------------------------------------------------------------ WebDataset
def _tar_rows(part: Part, leave: Leave) -> Rows:
    try:
        with _opened(part.path) as binary:
            for number, (key, members) in enumerate(_samples(_Ending(binary), part.path, leave)):
                try:
                    yield number, _tar_row(key, members, part.path, leave)
                except Dropped as dropped:
                    yield number, dropped
    except _DAMAGED as error:
        raise DataError(f"{part.path}: damaged or no tar archive: {error}") from None
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

    def __init__(self, binary: Binary):
        self._binary, self._last = binary, b""

    def read(self, size: int) -> bytes:
        """As that of a file."""
        data = self._binary.read(size)
        self._last = (self._last + data)[-tarfile.BLOCKSIZE :]
        return data

    def check(self) -> None:
        """Reads the rest, which checks the sum of what was compressed, and raises ReadError if the end is missing."""
        while self.read(_READ):
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


# ------------------------------------------------------------------------------------------------ JSON
def _entries(path: Path) -> "Iterator[dict[str, Json] | Dropped]":
    """The entries of a JSON list or of JSON lines.

    Raises:
      DataError: the file is neither.
    """
    lines = path.name.lower().endswith((".jsonl", ".jsonl.gz"))
    try:
        with _opened(path) as binary, io.TextIOWrapper(binary, "utf-8-sig") as file:
            for value in _lines(file, path) if lines else _values(file, path):
                fine = isinstance(value, (dict, Dropped))
                yield value if fine else Dropped("wrong-type", f"expected an object, found {value!r:.80}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None


def _opened(path: Path) -> Binary:
    return gzip.open(path) if path.suffix.lower() in (".gz", ".tgz") else path.open("rb")


def _lines(file: io.TextIOWrapper, path: Path) -> Iterator[Json]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield parse_json(line, f"{path.name}: line {number}")
            except DataError as error:
                yield Dropped("unreadable-line", str(error))


def _values(file: io.TextIOWrapper, path: Path) -> Iterator[Json]:
    """The values of a list, or of values that follow each other without one."""
    window = _Window(file, path)
    listed = window.next() == "["
    if listed:
        window.at += 1
    empty = listed and window.next() == "]"
    while window.next() and not empty:
        yield window.value()
        if listed:
            mark = window.next()
            if mark == "]":
                break
            if mark != ",":
                raise window.error("expected ',' or ']'")
            window.at += 1
    if listed:
        if window.next() != "]":
            raise window.error("the list has no end")
        window.at += 1
        if window.next():
            raise window.error("something stands behind the list")


class _Window:
    """The text of a file around the place where it is parsed.

    The standard library's parser is kept, for it reads numbers and halves of characters as all other readers here do.

    Attributes:
      at: the place in the window.
    """

    def __init__(self, file: io.TextIOWrapper, path: Path):
        self.at = 0
        self._file, self._path, self._text, self._before = file, path, "", 0
        self._decoder = json.JSONDecoder()

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more(_READ):
                return ""

    def value(self) -> Json:
        """The value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.at)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except ValueError as error:  # cut off, or wrong
                size = len(self._text) - self.at
                if size > _LONGEST or not self._more(max(_READ, size)):
                    raise self.error(str(error)) from None
                continue
            if not self._text[end : end + 32].strip("+-.0123456789eE") and self._more(_READ):
                continue  # a number may go on
            self.at = end
            return value

    def error(self, problem: str) -> DataError:
        """What is wrong, with the place."""
        return DataError(f"{self._path}: not valid JSON at character {self._before + self.at}: {problem}")

    def _more(self, size: int) -> bool:
        """Reads on; False at the end."""
        more = self._file.read(size)
        if not more:
            return False
        self._before += self.at
        self._text, self.at = self._text[self.at :] + more, 0
        return True


def total_rows(files: Files) -> int | None:
    """How many rows there are; None where only reading tells."""
    if files.kind != "Parquet":
        return None
    return sum(_parquet(path).metadata.num_rows for path in files.paths)
