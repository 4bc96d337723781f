"""Claims: of several workers, on one machine or many, one gets a cell. See `lock` and `bucket_lock`."""

import contextlib
import json
import time

from mllm_jax import bucket_lock, files, lock, storage
from mllm_jax.config import ConfigError
from mllm_jax.storage import Path
from mllm_jax.sweep.cells import CELLS, Cell

NOTE = "cell.json"
AGAIN = 30.0  # seconds between two looks at one claim of a holder that cannot be seen from here


class Claims:
    """The claims of a sweep's directory."""

    def __init__(self, directory: Path, recipe: str):
        self._directory, self._recipe = directory, recipe
        self._looked: dict[str, float] = {}  # cell -> when its claim was watched

    def place(self, cell: Cell) -> Path:
        """The folder of the cell's claim and note."""
        return self._directory / CELLS / cell.name

    def take(self, cell: Cell, look: bool = False) -> contextlib.ExitStack | None:
        """Claims a cell; closing what is returned gives it back. None: another worker has it.

        Args:
          look: also watch a claim whose worker cannot be seen from here, for it may have been left behind. That takes
            up to a minute, and is done once in `AGAIN` seconds.
        """
        place, held = self.place(cell), contextlib.ExitStack()
        alive = self._alive(cell)
        if True in alive or (None in alive and not (look and self._is_due(cell))):
            return None
        storage.make_folder(place)
        locked = bucket_lock.locked if storage.is_bucket(place) else lock.locked
        try:
            held.enter_context(locked(place))
        except ConfigError:
            return None
        return held

    def is_taken(self, cell: Cell) -> bool | None:
        """Whether somebody runs the cell; None if that cannot be seen from here."""
        alive = self._alive(cell)
        return True if True in alive else None if None in alive else False

    def _alive(self, cell: Cell) -> list[bool | None]:
        # The run's own lock is of somebody who trains in it without a claim.
        return [_alive(cell.workdir(self._directory) / "lock"), _alive(self.place(cell) / "lock")]

    def note(self, cell: Cell) -> None:
        """Writes down what the cell is, unless that stands there already; `mllm-jax study` reads it.

        To be called for a cell whose folder is known to hold no run of another configuration.
        """
        place, note = self.place(cell), cell.note(self._recipe)
        with contextlib.suppress(FileNotFoundError, ValueError):
            if json.loads(storage.read_text(place / NOTE)) == note:
                return
        storage.make_folder(place)
        files.write_json(place / NOTE, note)

    def _is_due(self, cell: Cell) -> bool:
        before, now = self._looked.get(cell.name, -AGAIN), time.monotonic()
        if now - before < AGAIN:
            return False
        self._looked[cell.name] = now
        return True


def _alive(path: Path) -> bool | None:
    """Whether the holder of a lock still runs; None if that cannot be seen from here, False without a lock."""
    try:
        holder = lock.parsed(storage.read_text(path, "replace"))
    except FileNotFoundError:
        return False
    return None if storage.is_bucket(path) and holder is not None else lock.is_alive(holder)
