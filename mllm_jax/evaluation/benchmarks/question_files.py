"""Rows of a benchmark's files, and the images that stand inside them.

JSON, JSON lines, TSV, CSV and Parquet give the same thing: a list of dicts. An image inside a table (base64 in
MMBench's TSV, a struct of bytes in Parquet) is replaced by a name; its bytes are read when they are asked for.
"""

import base64
import binascii
import bisect
import collections
import hashlib
import itertools
import re
import threading
from collections.abc import Iterator
from typing import Any

from mllm_jax import limits
from mllm_jax.data.reading import DataError, parse_json, parse_json_lines, read_json_rows, read_text
from mllm_jax.data.sample_keys import SYSTEM, media_problems
from mllm_jax.evaluation.benchmarks.base import IMAGES, VIDEOS
from mllm_jax.evaluation.predictions import BenchmarkError
from mllm_jax.evaluation.table_files import TABLES, read_whole_table
from mllm_jax.storage import Path

_ALWAYS_UNPACKED = 1 << 26  # bytes, whatever the size of the table's file
_BATCH = 16  # rows of a Parquet file that are decoded at once
_DATA_URI = re.compile(r"^data:image/[\w.+-]+;base64,")
_KEPT = 8  # columns of row groups that stay in memory: the images of a question and its neighbours


def read_json(path: Path) -> Any:
    """One JSON value, or the list of the rows of JSON lines (some benchmarks name those `.json`).

    Raises:
      BenchmarkError: it cannot be read, or is no JSON.
    """
    try:
        text = read_text(path)
        try:
            return parse_json(text, path)
        except DataError:
            rows = parse_json_lines(text, path)
            return rows if len(rows) > 1 else parse_json(text, path)
    except DataError as error:
        raise BenchmarkError(str(error)) from error


class FileRow(dict[str, Any]):
    """A row of a benchmark's file; `row[name]` is there and not null, or an error says where it is missing.

    Attributes:
      where: file and row, for messages.
    """

    def __init__(self, path: Path, index: int, values: dict[str, Any]):
        super().__init__(values)
        which = values.get("question_id", values.get("_id", f"#{index}"))
        self.where = f"{path}: entry {which!r}"

    def __getitem__(self, name: str) -> Any:
        return self.first(name)

    def first(self, *names: str) -> Any:
        """The field under the first of several names that is there.

        Raises:
          BenchmarkError: none is; names file, row and field.
        """
        for name in names:
            if (value := self.get(name)) is not None:
                return value
        wanted = " or ".join(map(repr, names))
        raise BenchmarkError(f"{self.where}: a row has no {wanted}; it has {', '.join(sorted(self))}")

    def typed(self, name: str, kind: type) -> Any:
        """A required field of a type; a `question_id` may be a string or an integer.

        Raises:
          BenchmarkError: it is missing or of another type.
        """
        value = self.get(name)
        if not isinstance(value, (str, int) if name == "question_id" else kind):
            hint = "; this is training data, questions are written otherwise" * ("conversations" in self)
            raise BenchmarkError(
                f"{self.where}: {name!r} must be a {kind.__name__}, found {value!r}{hint} "
                "(docs/data.md, Questions to answer)"
            )
        return value

    def shown(self) -> dict[str, Any]:
        """`images` and `medium` of the question (`base.Question`): under `image` one name, a list of names, or nothing;
        under `video` the name of one.

        Raises:
          BenchmarkError: something else, or a key that names another medium or a system text, which are not read.
        """
        video = self.get("video")
        for problem in media_problems(self, videos=True):
            raise BenchmarkError(f"{self.where}: {problem}")
        for key in SYSTEM:
            if self.get(key):
                raise BenchmarkError(
                    f"{self.where}: {key!r}: questions have no system text of their own; put it in the question, or "
                    "choose a template that has it (eval.template)"
                )
        value = self.get("image")
        if video not in (None, "", []):
            if not isinstance(video, str) or value:
                raise BenchmarkError(
                    f"{self.where}: 'video' must be one file name, without an 'image' beside it"
                )
            return {"images": (video,), "medium": VIDEOS}
        names = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise BenchmarkError(f"{self.where}: 'image' must be a file name or a list of them")
        return {"images": tuple(names), "medium": IMAGES}


def read_rows(path: Path, images: "EmbeddedImages", key: str = "") -> list[FileRow]:
    """The rows of a table, chosen by its suffix.

    Args:
      images: takes what images the table holds.
      key: of JSON that is an object: where its list of rows is ("" = the object maps ids to rows, which get the id
        as `_id`).

    Raises:
      BenchmarkError: it cannot be read; names the file.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _as_rows(path, images.add_parquet(path))
    if suffix in TABLES:
        return _as_rows(path, read_whole_table(path))
    if suffix != ".json":
        return read_list(path)
    value = read_json(path)
    if isinstance(value, dict) and key:
        value = value.get(key)
    elif isinstance(value, dict) and all(isinstance(row, dict) for row in value.values()):
        value = [{"_id": name, **row} for name, row in value.items()]
    elif isinstance(value, dict):  # JSON lines of one line
        value = [value]
    return _as_rows(path, value, f" under {key!r}" if key else "")


def read_list(path: Path) -> list[FileRow]:
    """The entries of a JSON list (or of JSON lines).

    Raises:
      BenchmarkError: no such file, no JSON, no list, or an entry that is no object.
    """
    try:
        return _as_rows(path, read_json_rows(path))
    except DataError as error:
        raise BenchmarkError(str(error)) from error


def _as_rows(path: Path, rows: Any, place: str = "") -> list[FileRow]:
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path}: expected a list of questions{place}, found one {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{path}: entry #{index} is no JSON object but {type(row).__name__}")
    return [FileRow(path, index, row) for index, row in enumerate(rows)]


class EmbeddedImages:
    """Images inside a benchmark's tables, found by name and read one at a time; safe to read from threads."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._cells: dict[str, tuple[_Parquet, int, str]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._texts or name in self._cells

    def add_base64(self, text: str) -> str:
        """Takes an image as text; equal images get the same name."""
        name = f"base64-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self._texts[name] = text
        return name

    def add_parquet(self, path: Path) -> list[dict[str, Any]]:
        """The rows of a Parquet file, names in the place of images (None where there is none)."""
        file = _Parquet(path)
        rows = file.rows()
        for index, row in enumerate(rows):
            for column in file.image_columns:
                if row[column] is not None:
                    row[column] = f"{path.parent.name}/{path.name}#{index}.{column}"
                    self._cells[row[column]] = (file, index, column)
        return rows

    def read(self, name: str) -> bytes:
        """The encoded image.

        Raises:
          BenchmarkError: it is damaged.
        """
        if name in self._cells:
            file, row, column = self._cells[name]
            return file.image(row, column)
        try:
            # Cells may be wrapped, or be data URIs.
            text = "".join(self._texts[name].split())
            return base64.b64decode(_DATA_URI.sub("", text), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BenchmarkError(f"image {name}: not base64: {error}; fetch the table again") from error


class _Parquet:
    """A Parquet file whose struct columns with `bytes` are images, as the Hugging Face hub writes them."""

    def __init__(self, path: Path):
        # Comes with tensorflow-datasets; a slow import that other benchmarks do not need.
        import pyarrow
        import pyarrow.parquet as parquet

        self.path = path
        self._errors = (OSError, pyarrow.ArrowException)
        kinds = pyarrow.types
        try:
            schema = parquet.read_schema(path)
            texts = [f.name for f in schema if kinds.is_string(f.type) or kinds.is_binary(f.type)]
            # Repeated texts are kept once, until they are counted.
            self._file = parquet.ParquetFile(path, read_dictionary=texts)
        except self._errors as error:
            raise BenchmarkError(f"{path}: no readable Parquet file: {error}; fetch it again") from error
        self.columns = list(schema.names)
        structs = [field for field in schema if kinds.is_struct(field.type)]
        self.image_columns = [field.name for field in structs if field.type.get_field_index("bytes") >= 0]
        counts = (self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups))
        self._starts = [0, *itertools.accumulate(counts)]
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[int, str], Any] = collections.OrderedDict()

    def rows(self) -> list[dict[str, Any]]:
        """All rows; of images only whether they are there (an empty dict or None)."""
        # `image.path` alone: the bytes stay on the disk.
        wanted = [f"{name}.path" if name in self.image_columns else name for name in self.columns]
        return [row for batch in self._batches(columns=wanted) for row in batch.to_pylist()]

    def _batches(self, **options: Any) -> Iterator[Any]:
        """A few rows at a time: a cell that is repeated is kept once in the file, but not in memory.

        Raises:
          BenchmarkError: damaged, or all rows together take more than the limits `MAX_TABLE_BYTES` or
            `MAX_ARCHIVE_RATIO`.
        """
        size = 0
        try:
            for batch in self._file.iter_batches(batch_size=_BATCH, **options):
                size += sum(map(_unpacked_size, batch.columns))
                limits.check("MAX_TABLE_BYTES", size, self.path)
                if size > _ALWAYS_UNPACKED:
                    limits.check("MAX_ARCHIVE_RATIO", size // self.path.stat().st_size, self.path)
                yield batch
        except limits.LimitError as error:
            raise BenchmarkError(str(error)) from error
        except self._errors as error:
            raise BenchmarkError(f"{self.path}: damaged Parquet file: {error}; fetch it again") from error

    def image(self, row: int, column: str) -> bytes:
        group = bisect.bisect_right(self._starts, row) - 1
        with self._lock:
            if (group, column) not in self._kept:
                batches = self._batches(row_groups=[group], columns=[column])
                self._kept[group, column] = [cell for batch in batches for cell in batch.column(0)]
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            cell = self._kept[group, column][row - self._starts[group]].as_py()
        if not cell or not cell.get("bytes"):
            raise BenchmarkError(f"{self.path} row {row}: {column!r} holds no image; fetch the file again")
        return cell["bytes"]


def _unpacked_size(column: Any) -> int:
    """Bytes of a column's cells, each counted as often as it occurs."""
    import pyarrow
    import pyarrow.compute as compute

    if not pyarrow.types.is_dictionary(column.type):
        return column.nbytes
    try:
        lengths = compute.binary_length(column.dictionary)
    except pyarrow.ArrowException:  # numbers
        return column.nbytes
    return compute.sum(lengths.take(column.indices)).as_py() or 0
