"""Writing files: whole or not at all, never through a link that somebody planted; and names that may become paths.

Work directories are shared, and run folders come from strangers. So a file is written under a random temporary name
that is opened exclusively, then put in place of what is there: a symbolic link is replaced, not followed. Files that
grow (answers, logs) are opened without following a link; see `line_file`. In a bucket an object is put there in one
request, which is all of that.
"""

import contextlib
import errno
import io
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from mllm_jax.storage import Path, as_path, is_bucket

STALE = 3600.0  # seconds after which a temporary file belongs to a run that was killed
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.part")
_SURROGATES = re.compile("[\ud800-\udfff]")
_LONGEST_NAME = 200  # bytes; most file systems take 255, and suffixes are added


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once the block ends, and vanishes if the block fails.

    A regular file that is replaced keeps its permission bits; a new one has those that the umask leaves. What
    becomes an object in a bucket is kept in memory until then.

    Args:
      path: what to write, in a folder that exists.
      sync: force the data to the disk first, so that a complete name has complete contents after a power failure.

    Raises:
      OSError: no such folder, a full disk.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with replacing(f"{folder}/a.txt") as file:
      ...         _ = file.write(b"whole")
      ...     os.listdir(folder)
      ['a.txt']
    """
    path = as_path(path)
    if is_bucket(path):
        memory = io.BytesIO()
        yield memory
        path.write_bytes(memory.getvalue())
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with open(descriptor, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG(mode := path.lstat().st_mode):
                    os.fchmod(descriptor, stat.S_IMODE(mode))
            yield file
            file.flush()
            if sync:
                os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file by text in UTF-8; half of a surrogate pair, which has no bytes, is spelled out (`\\ud800`)."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], value: Any, **options: Any) -> None:
    """Writes JSON and a line break, whole or not at all; see `replacing`.

    Args:
      options: of `json.dumps`; non-ASCII characters stay and the indent is 1 unless they say otherwise.
    """
    write_text(path, json_text(value, **{"indent": 1, **options}) + "\n")


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Writes JSON lines as `write_text` writes a text."""
    write_text(path, "".join(json_text(row) + "\n" for row in rows))


def json_text(value: Any, **options: Any) -> str:
    r"""JSON that UTF-8 can hold: characters as they are, but halves of surrogate pairs escaped.

    Args:
      options: of `json.dumps`.

    Example:
      >>> json_text(["\ud800"])
      '["\\ud800"]'
    """
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    return _SURROGATES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def no_links(path: str, flags: int) -> int:
    """An opener for `open` that refuses a symbolic link, for files that are changed in place.

    Raises:
      OSError: `path` is a symbolic link.

    Example:
      `open(path, "a", opener=no_links)`
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        said = "is a symbolic link, and nothing is written through one; remove it or give the file itself"
        raise OSError(error.errno, said, os.fspath(path)) from None


def is_temporary(path: Path) -> bool:
    """Whether `path` is what `replacing` leaves behind when its process is killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_stale(folder: Path) -> None:
    """Removes what processes that were killed while writing into `folder` left behind, an hour ago or more."""
    for path in () if is_bucket(folder) else folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if is_temporary(path) and time.time() - path.lstat().st_mtime > STALE:
                path.unlink()


def check_name(name: str, what: str) -> str:
    """Returns `name` if it may become a file's or folder's name and a heading.

    Args:
      name: from a configuration, a question file or a run folder's JSON.
      what: whose name it is, for the message.

    Raises:
      ValueError: it is empty, too long or begins with a dot, or holds a separator, a line break or another character
        that cannot be printed.

    Example:
      >>> check_name("gqa, short", "benchmark")
      'gqa, short'
    """
    fault = ""
    if not name.strip():
        fault = "is empty"
    elif not name.isprintable():
        fault = "holds a character that cannot be printed"
    elif "/" in name or "\\" in name:
        fault = "holds a path separator"
    elif name.startswith("."):
        fault = "begins with a dot"
    elif len(name.encode()) > _LONGEST_NAME:
        fault = f"is longer than {_LONGEST_NAME} bytes"
    if fault:
        raise ValueError(f"{what} {name!r:.100} {fault}; choose another name")
    return name
