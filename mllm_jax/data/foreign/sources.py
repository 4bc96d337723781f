"""The rows of Parquet files, WebDataset tars and JSON files, one after the other, in parts that can be read alone.

Nothing is read whole: Parquet a batch of rows at a time, tars as a stream, JSON value by value.
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mllm_jax.data.foreign.json_files import json_entries
from mllm_jax.data.foreign.parquet_files import open_parquet, parquet_rows
from mllm_jax.data.foreign.report import Dropped, Entry, Leave
from mllm_jax.data.foreign.tar_files import tar_rows
from mllm_jax.data.reading import DataError

# kind -> how the names of its files end; of a folder the first kind that it has is read
ENDINGS: dict[str, tuple[str, ...]] = {
    "WebDataset": (".tar", ".tar.gz", ".tgz"),
    "Parquet": (".parquet",),
    "JSON": (".jsonl", ".json", ".jsonl.gz", ".json.gz"),
}
_SPLIT = re.compile(r"(?i)(?:^|[-_.])(train|test|val|validation|dev)(?=[-_.]|$)")
_LOOKED_AT = 100  # rows whose columns are taken for those of the data set, where only rows tell
_CHUNK = 500  # entries of JSON of a part


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
    entries: tuple[Entry, ...] = ()


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
        return open_parquet(path).schema_arrow.names
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
            first, metadata = 0, open_parquet(path).metadata
            for group in range(metadata.num_row_groups):
                yield part(group, group=group, first=first)
                first += metadata.row_group(group).num_rows
        elif files.kind == "WebDataset":
            yield part(0)
        else:
            entries = json_entries(path)
            for first in itertools.count(0, _CHUNK):
                chunk = tuple(itertools.islice(entries, _CHUNK))
                if not chunk:
                    break
                yield part(first, first=first, entries=chunk)


def rows(part: Part, wanted: frozenset[str], leave: Leave) -> Iterator[tuple[int, Entry]]:
    """The rows of a part, or why one is left out, each with its number in its file.

    Args:
      wanted: columns that are read of a Parquet file.
      leave: called with a name, where it was and how often, for what is not read.

    Raises:
      DataError: the file cannot be read.
    """
    found: Iterable[Entry] = part.entries
    if part.kind == "Parquet":
        found = parquet_rows(part.path, part.group, wanted, lambda name, count: leave(name, part.name, count))
    elif part.kind == "WebDataset":
        found = tar_rows(part.path, leave)
    return enumerate(found, part.first)


def total_rows(files: Files) -> int | None:
    """How many rows there are; None where only reading tells."""
    if files.kind != "Parquet":
        return None
    return sum(open_parquet(path).metadata.num_rows for path in files.paths)
