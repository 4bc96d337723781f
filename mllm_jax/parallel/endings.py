"""How a run of several processes ends where one of them fails: the others are told, and nobody waits.

A process that raises would wait for the others in JAX's exit barrier, for minutes, and meanwhile show its sign of life,
while they wait in a collective for its part. So it tells them through JAX's coordination service, closes what it has
open and leaves without the barrier. In each process a thread listens: the main thread may be waiting for its devices,
which nothing can interrupt. One that is killed tells nothing; those who miss it call the roll and name it.

What all processes raise at the same point (`agreed`) ends in the usual way.
"""

import atexit
import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # the public module does not give out its client

from mllm_jax import console

E = TypeVar("E", bound=BaseException)
FOLDER = "mllm_jax/endings"  # of the keys in the coordination service
LISTEN = 1.0  # seconds between two looks at them
ANSWERED = 5 * LISTEN  # seconds after which every process that is alive has looked and answered
CLOSING = 20.0  # seconds that a failed process may take for closing: it may wait for what never comes
# Errors of a collective without its peer: a status of XLA's, and one of these words.
LOST = r"(?s)(?=[A-Z_]+: )(?i:.*(gloo|nccl|coordination|heartbeat|connection|unavailable|socket))"

GONE = "has died or cannot be reached"

_spoken = threading.Lock()  # held once the end of another process has been told to the user
_failed = threading.Event()  # this process has an error of its own, which the others know


def agreed(error: E) -> E:
    """Marks an error that every process of the run raises at this point, so that none has to be told."""
    error.agreed = True
    return error


def listen() -> None:
    """Starts the thread that ends this process once another one tells that it fails."""
    stop = threading.Event()
    thread = threading.Thread(target=_listen, args=(stop,), daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    atexit.register(end)  # runs before what JAX registered: the service is still there


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Tells the other processes of an error in the block, unless it is `agreed`, and raises it.

    What closes while it goes up has `CLOSING` seconds. Where the error is that another process is gone, the user is
    told which; around it all (`script.run`), this also ends the process, before what failed after that is told.
    """
    try:
        yield
    except BaseException as error:
        if _is_common(error):
            raise
        if _is_loss(error):
            if _spoken.locked():
                _leave(error)
            _say(_missing(error))
        elif not _failed.is_set():
            _failed.set()
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process is gone
                _tell("ended", global_state.process_id, _failure(error))
        late = threading.Timer(CLOSING, _leave, (error,))
        late.daemon = True
        late.start()
        raise


def leave(error: BaseException) -> None:
    """Ends this process at once where the others do not raise the same; comes last.

    Args:
      error: what ends it; `SystemExit` where the user was told.
    """
    if not _is_common(error):
        _leave(error)


def _is_common(error: BaseException) -> bool:
    """Whether nobody has to be told: there is no other process, all know, or nothing failed."""
    if not jax.distributed.is_initialized() or global_state.num_processes == 1:
        return True
    done = isinstance(error, SystemExit) and not error.code
    return done or any(getattr(each, "agreed", False) for each in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """The error, and those that it came from or that were being handled when it was raised, the first one last."""
    chain, before = [error], _before(error)
    while before is not None:
        # JAX puts errors of its own between an error and what came before it.
        if not type(before).__module__.startswith("jax._src"):
            chain.append(before)
        before = _before(before)
    return chain


def _before(error: BaseException) -> BaseException | None:
    return error.__context__ if error.__cause__ is None else error.__cause__


def _is_loss(error: BaseException) -> bool:
    """Whether something was computed with a process that is gone; what fails after that does not matter."""
    first = _chain(error)[-1]  # JAX makes some of XLA's errors a ValueError
    of_xla = isinstance(first, jax.errors.JaxRuntimeError | ValueError)
    return of_xla and re.match(LOST, str(first)) is not None


def _failure(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"has failed ({type(error).__name__}: {lines[0][:400]})"


def _leave(error: BaseException) -> None:
    if _failed.is_set() or not _spoken.locked():
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        elif isinstance(error.code, str):
            console.complain(error.code)
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if global_state.process_id == 0:
        time.sleep(ANSWERED)  # it keeps the keys, which the others are still to read
    _exit(code)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _listen(stop: threading.Event) -> None:
    answered = False
    while not stop.wait(LISTEN) and jax.distributed.is_initialized():
        try:
            found = _found()
            if not answered and any(kind == "asked" for kind, _ in found):
                answered = True
                _tell("here", global_state.process_id)
        except (
            jax.errors.JaxRuntimeError
        ):  # the service does not answer; where it stays so, JAX ends this process
            continue
        if ended := _ended(found):
            _say(ended)
            stop.wait(CLOSING if _failed.is_set() else ANSWERED)  # it may be about to tell of its own error
            _exit(1)


def _say(ended: dict[int, str]) -> None:
    """Tells the user which other processes have ended, once."""
    if not _spoken.acquire(blocking=False):
        return
    each = "; ".join(f"process {index} of this run {how}" for index, how in sorted(ended.items()))
    console.complain(
        f"{each}; its own output says why. Start all processes again: the run goes on from its last checkpoint"
    )


def _missing(error: BaseException) -> dict[int, str]:
    """Which processes have told that they fail, or else do not answer; all others are told.

    Args:
      error: of what was computed with them.
    """
    try:
        if ended := _ended(_found()):
            return ended
        _tell("asked", global_state.process_id)
        time.sleep(ANSWERED)
        found = _found()
        if ended := _ended(found):
            return ended
        answered = {index for kind, index in found if kind == "here"} | {global_state.process_id}
        missing = set(range(global_state.num_processes)) - answered
        for index in missing:
            _tell("ended", index, GONE)
        if not missing:
            _tell("ended", global_state.process_id, _failure(error))
        return dict.fromkeys(missing, GONE) or {global_state.process_id: _failure(error)}
    except jax.errors.JaxRuntimeError:  # nor does the service answer, which is the first process's
        return {0: GONE}


def _ended(found: dict[tuple[str, int], str]) -> dict[int, str]:
    """How the other processes have ended, by their index."""
    return {
        index: how
        for (kind, index), how in found.items()
        if kind == "ended" and index != global_state.process_id
    }


def _tell(kind: str, index: int, text: str = "-") -> None:
    _client().key_value_set(f"{FOLDER}/{kind}/{index}", text, allow_overwrite=True)


def _found() -> dict[tuple[str, int], str]:
    """What the processes have told: {(kind, index): text}."""
    told = {}
    for key, text in _client().key_value_dir_get(FOLDER):
        kind, index = key.split("/")[-2:]
        told[kind, int(index)] = text
    return told


def _client() -> Any:
    return global_state.client
