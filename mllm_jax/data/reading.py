"""Reading files that others made: text, JSON, and files that a data file names.

Every reader of data goes through here, so that all of them accept the same encodings, refuse the same paths and answer
with a `DataError` instead of a traceback.
"""

import gzip
import io
import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mllm_jax import limits, storage

Json = Any


class DataError(ValueError):
    """Data that cannot be used as it is; the message names the file, the sample and what to change."""


def read_text(path: str | storage.Path) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises:
      DataError: no such file, no regular file, not UTF-8, or larger than the limit `MAX_TEXT_BYTES`.
    """
    path = storage.as_path(path)
    try:
        limits.check("MAX_TEXT_BYTES", storage.size(path), path)
        return storage.read_text(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); is this a JSON file?") from None
    except limits.LimitError as error:
        raise DataError(str(error)) from None


def open_unpacked(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """The bytes of a file, unpacked where its name ends in .gz or .tgz."""
    return gzip.open(path) if path.suffix.lower() in (".gz", ".tgz") else path.open("rb")


def parse_json(text: str, where: str | storage.Path) -> Json:
    """A JSON value.

    Raises:
      DataError: no JSON, or nested too deeply; it begins with `where`.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise DataError(f"{where}: not valid JSON: {error}") from None


def read_json(path: str | storage.Path) -> Json:
    """The value in a JSON file.

    Raises:
      DataError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path), path)


def read_object(path: str | storage.Path) -> dict[str, Json]:
    """The JSON object in a file.

    Raises:
      DataError: as `read_text` and `parse_json`, or another value.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {value!r:.60}")
    return value


def parse_json_lines(text: str, path: str | storage.Path) -> list[Json]:
    """The values of JSON lines; lines that hold nothing are left out.

    Raises:
      DataError: a line that is no JSON; it names the line.
    """
    lines = enumerate(text.split("\n"), 1)  # str.splitlines would cut strings at U+2028
    return [parse_json(line, f"{path}: line {number}") for number, line in lines if line.strip()]


def read_json_rows(path: str | storage.Path) -> Json:
    """The value in a `.json` file, or the list of values in a `.jsonl` file.

    Raises:
      DataError: as `read_text` and `parse_json`.
    """
    text = read_text(path)
    if storage.as_path(path).suffix == ".jsonl":
        return parse_json_lines(text, path)
    try:
        return parse_json(text, path)
    except DataError as error:
        hint = " (one sample per line? then name the file .jsonl)" if "Extra data" in str(error) else ""
        raise DataError(f"{error}{hint}") from None


def is_safe_name(name: str) -> bool:
    """Whether a path in a data file is relative and stays below the folder it is relative to.

    Backslashes count as separators and drive letters as absolute, so that the answer is the same on every system.

    Example:
        >>> [is_safe_name(name) for name in ("coco/1.jpg", "/etc/passwd", "a/../../b", "C:/b", "..\\\\b")]
        [True, False, False, False, False]
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    drive = PureWindowsPath(name).drive
    return bool(name) and "\0" not in name and not (parts.is_absolute() or ".." in parts.parts or drive)


def safe_path(root: str | Path, name: str) -> Path:
    """The file below `root` that a data file names.

    Symbolic links below `root`, and `root` itself as one, are followed: image folders on clusters are made of them.
    (`convert` refuses links in archives that it unpacks, and what is copied or shown is decoded as an image first.)

    Raises:
      DataError: an absolute path, or one that leaves the folder.
    """
    if not is_safe_name(name):
        raise DataError(f"path {name!r} must be relative and stay in the folder {root}")
    return Path(root) / name


def read_image_file(root: str | Path, name: str, sample: str) -> bytes:
    """The bytes of an image file that a data file names.

    Args:
      root: the folder that its path starts from.
      name: its path, see `safe_path`.
      sample: id of the sample or question that shows it, for messages.

    Raises:
      DataError: an unsafe path, a file that is missing, unreadable, empty, no regular file, or larger than the limit
        `MAX_IMAGE_FILE_BYTES`; names sample and path.
    """
    try:
        path = safe_path(root, name)
    except DataError as error:
        raise DataError(f"sample {sample!r}: image {error}") from None
    try:
        # Without waiting: opening a pipe would wait for its writer.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"sample {sample!r}: image file {path} is not a regular file")
            limits.check("MAX_IMAGE_FILE_BYTES", status.st_size, f"sample {sample!r}: image file {path}")
            data = file.read()
    except OSError as error:
        message = f"sample {sample!r}: image file {path} cannot be read: {error.strerror}"
        raise DataError(message) from error
    except limits.LimitError as error:
        raise DataError(str(error)) from None
    if not data:
        raise DataError(f"sample {sample!r}: image file {path} is empty")
    return data
