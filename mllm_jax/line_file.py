"""Files of lines that only grow: logs and answers.

On a disk a line goes to the operating system at once. To an object nothing can be appended, so the whole object is
written again: when it is asked for (`sync`, `close`), and while lines come in every `INTERVAL` seconds, or less often
where a write takes long. A process that is killed loses the lines since then, of which a reader sees nothing.
"""

import time
from typing import Any

from mllm_jax.files import no_links, write_bytes
from mllm_jax.storage import Path, is_bucket

INTERVAL = 30.0  # seconds
SHARE = 0.05  # of the time that may go into writing objects


def whole_lines(path: Path, repair: bool = False) -> bytes:
    """The lines of a file that have an end; nothing where there is no file.

    Args:
      repair: remove the one behind them that a kill or a full disk tore (an object has none).

    Raises:
      OSError: the file cannot be read or changed.
    """
    if not path.exists():
        return b""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if repair and whole < len(data) and not is_bucket(path):
        with open(path, "r+b", opener=no_links) as file:
            file.truncate(whole)
    return data[:whole]


class LineFile:
    """A file to whose end lines are added; it is made with the first one.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with LineFile(pathlib.Path(folder) / "a.jsonl") as file:
      ...         file.append("{}")
      ...     whole_lines(file.path)
      b'{}\\n'
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None  # on a disk
        self._data: bytearray | None = None  # in a bucket: the object with what is to be written
        self._written = 0  # bytes of it that are there
        self._next = 0.0  # when it is written again

    def append(self, line: str) -> None:
        """Adds a line, without a line break in it.

        Raises:
          OSError: it cannot be written.
        """
        if not is_bucket(self.path):
            if self._file is None:
                self._file = open(  # noqa: SIM115 (closed by `close`)
                    self.path, "a", buffering=1, encoding="utf-8", newline="\n", opener=no_links
                )
            self._file.write(line + "\n")
            return
        if self._data is None:
            self._data = bytearray(whole_lines(self.path))
            self._written, self._next = len(self._data), time.monotonic() + INTERVAL
        self._data += line.encode() + b"\n"
        if time.monotonic() >= self._next:
            self.sync()

    def sync(self) -> None:
        """Makes sure that the lines so far survive this process.

        Raises:
          OSError: they cannot be written.
        """
        if self._data is None or self._written == len(self._data):
            return
        begin = time.monotonic()
        write_bytes(self.path, bytes(self._data))
        self._written, end = len(self._data), time.monotonic()
        self._next = end + max(INTERVAL, (end - begin) / SHARE)

    def close(self) -> None:
        """Ends writing; appending again reopens the file.

        Raises:
          OSError: the last lines cannot be written.
        """
        self.sync()
        self._data = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
