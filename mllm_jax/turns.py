"""Runs on one machine that share prepared data take turns, so that each thing is computed once.

The lock is the operating system's (flock): it ends with the process that holds it, however that ends. Where a file
system has none, the work is done twice, with the same result.
"""

import contextlib
import pathlib
from collections.abc import Iterator

from filelock import FileLock, Timeout

from mllm_jax.console import make_console, say

FILE = ".turn"


@contextlib.contextmanager
def taking_turns(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Waits until no other run is inside with this folder, which is made.

    Args:
      what: the others may be doing, for the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / FILE)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.acquire(timeout=0))
        except Timeout:
            say(make_console(), f"waiting for another run that is {what} in {folder}")
            held.enter_context(lock.acquire())
        except (
            NotImplementedError,
            OSError,
        ):  # a file system without locks, or one that cannot be written to
            pass
        yield
