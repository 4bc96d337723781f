"""Answers on disk: JSON lines that survive a kill, and a note of whose answers they are."""

import json
from collections.abc import Mapping
from typing import Any

from mllm_jax.answers_kept import MANIFEST
from mllm_jax.data.reading import DataError, read_object
from mllm_jax.files import json_text, write_json
from mllm_jax.line_file import LineFile, whole_lines
from mllm_jax.storage import Path, make_folder

DIGESTS = {"benchmark": "to other questions", "model": "of another model"}  # of what is noted as a digest
Key = tuple[str, int]  # (question_id, rotation)


class StoreError(ValueError):
    """Answers on disk that do not belong here or are damaged; the message says what to do."""


def key_of(row: Mapping[str, Any]) -> Key:
    """`(question_id, rotation)` of a stored answer."""
    return str(row["question_id"]), int(row.get("rotation") or 0)


def check_manifest(directory: Path, identity: dict[str, Any]) -> None:
    """Makes a folder of answers belong to a model, benchmark and settings, or checks that it does.

    Raises:
      StoreError: it holds another model's, benchmark's or setting's answers.
    """
    make_folder(directory)
    path = directory / MANIFEST
    if path.exists():
        try:
            found = read_object(path)
        except DataError as error:
            raise StoreError(f"{error}; move that folder away") from error
        different = [k for k in sorted({*found, *identity}) if found.get(k) != identity.get(k)]
        if different:
            listed = ", ".join(
                DIGESTS.get(k) or f"{k}: {found.get(k)!r} there, {identity.get(k)!r} now" for k in different
            )
            raise StoreError(
                f"{directory} holds answers that this run cannot continue ({listed}); move that folder away, or "
                "evaluate into another one (eval.py --out)"
            )
        return
    if any(directory.glob("*.jsonl")):
        raise StoreError(
            f"{directory} holds answers, but no {MANIFEST} says whose they are; move that folder away"
        )
    write_json(path, identity)


class AnswerFile:
    """Rows of answers, one JSON object per line, appended as they come.

    A last line that was cut off by a kill is removed when the file is opened; its question is asked again.

    Attributes:
      rows: `(question_id, rotation)` -> row, in file order.
    """

    def __init__(self, path: Path, writable: bool = True):
        """Reads what is there.

        Raises:
          StoreError: a damaged line other than the last, or a repeated question.
        """
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        self._file = LineFile(path) if writable else None
        for number, line in enumerate(whole_lines(path, repair=writable).split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                key = key_of(row)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
                raise StoreError(
                    f"{self.path} line {number} is damaged ({error}); delete that line and run again"
                ) from error
            if key in self.rows:
                raise StoreError(
                    f"{self.path} line {number} answers {key} a second time; delete one of the two lines"
                )
            self.rows[key] = row

    def append(self, row: dict[str, Any]) -> None:
        """Adds an answer; see `LineFile` for when it is safe."""
        self.rows[key_of(row)] = row
        if self._file is not None:
            self._file.append(json_text(row))

    def close(self) -> None:
        """Ends writing; appending again reopens the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
