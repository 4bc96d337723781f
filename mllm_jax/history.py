"""How often a run was started: when, from where, and with which keys changed."""

import contextlib
import datetime
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from mllm_jax import storage
from mllm_jax.storage import Path

HISTORY = "history.jsonl"


class Start(NamedTuple):
    """A start of a run: its time in seconds since the epoch, its current directory, the keys that it changed.

    What is not noted is now, no directory and no key.
    """

    time: float
    directory: pathlib.Path | None
    changed: frozenset[str]


def starts(workdir: Path) -> Iterator[Start]:
    """The starts of a run, the first one first, without lines that a full disk cut off or that are not ours."""
    with contextlib.suppress(FileNotFoundError):
        for line in storage.read_text(workdir / HISTORY, "replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
                noted = json.loads(line)
                when = noted.get("time")
                time = datetime.datetime.fromisoformat(when) if when else datetime.datetime.now()
                directory = noted.get("directory")
                yield Start(
                    time.timestamp(),
                    pathlib.Path(directory) if directory else None,
                    frozenset(noted.get("changed", ())),
                )
