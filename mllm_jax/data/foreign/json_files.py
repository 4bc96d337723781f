"""The entries of JSON files, value by value."""

import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from mllm_jax.data.foreign.layouts import Json
from mllm_jax.data.foreign.report import Dropped, Entry
from mllm_jax.data.reading import DataError, open_unpacked, parse_json

_READ = 1 << 20  # characters of JSON that are read at once
_LONGEST = 1 << 28  # characters of one JSON value


def json_entries(path: Path) -> Iterator[Entry]:
    """The entries of a JSON list or of JSON lines.

    Raises:
      DataError: the file is neither.
    """
    lines = path.name.lower().endswith((".jsonl", ".jsonl.gz"))
    try:
        with open_unpacked(path) as binary, io.TextIOWrapper(binary, "utf-8-sig") as file:
            for value in _lines(file, path) if lines else _values(file, path):
                fine = isinstance(value, (dict, Dropped))
                yield value if fine else Dropped("wrong-type", f"expected an object, found {value!r:.80}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None


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
