"""A lock that keeps two runs out of one work directory.

The file `lock` names the host and the process that hold the directory. It is removed when they are done. One that was
left behind is taken over:

* on the same host when its process is gone (or another program has got its number);
* on another host, or in another container, whose processes cannot be looked up, when it shows no sign of life for
  `PATIENCE` seconds. A holder touches the file every `BEAT` seconds; what counts is that the file's time changes
  while one waits, so clocks need not agree.

A holder that was suspended for so long may have lost the lock without knowing it, so it asks (`Lock.check`) before it
writes. For directories in buckets see `bucket_lock`.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from mllm_jax import files
from mllm_jax.schema import ConfigError
from mllm_jax.storage import Path

BEAT = 10.0
PATIENCE = 45.0
WAITING = "%s names %s; waiting %d s for a sign of life"


class LockLostError(RuntimeError):
    """Another run has taken the directory over; the message says which."""


@dataclasses.dataclass(frozen=True)
class Lock:
    """A lock that this process has taken.

    Attributes:
      path: of the lock file.
      text: what the file says while the lock is held.
    """

    path: pathlib.Path
    text: str

    def check(self) -> None:
        """Makes sure that the lock is still held; to be called before anything is written.

        Raises:
          LockLostError: another run has taken it, or somebody has removed it.
        """
        try:
            found = _text(self.path)
        except FileNotFoundError:
            found = ""
        except OSError as error:  # a shared disk that does not answer now says nothing of who holds the lock
            logging.warning("%s cannot be read: %s", self.path, error)
            return
        if found != self.text:
            raise LockLostError(lost(self.path, parsed(found)))


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[Lock]:
    """Holds `directory`, which exists, for the duration of the block.

    Raises:
      ConfigError: another process holds it; names the process and its host.
    """
    lock = Lock(directory / "lock", json.dumps(this_process()))
    _acquire(lock)
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(lock, done), daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        done.set()
        thread.join()
        if lock.path.exists():
            with _exclusive(lock.path) as file:
                if file.read() == lock.text:
                    lock.path.unlink()


def lost(path: Path, holder: dict[str, Any] | None) -> str:
    """What is told when a lock is no longer held: `holder` has it, or nobody."""
    if holder is not None:
        return f"{path.parent} was taken over by {name_of(holder)} while this process stood still, and is left to it"
    return (
        f"{path} is gone: another run has used {path.parent}, or somebody removed it; the same command continues from "
        "the last checkpoint"
    )


def in_use(path: Path, holder: dict[str, Any]) -> str:
    """What is told when another process holds a lock."""
    return (
        f"{path.parent} is in use by {name_of(holder)}; wait for it, stop it or choose another --workdir (if that "
        f"process is gone, delete {path})"
    )


def this_process() -> dict[str, Any]:
    """What a lock says of its holder."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "process": pid,
        "born": _born(pid),
        "namespace": _namespace(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _born(pid: int) -> str | None:
    """When a process was started, in ticks since the boot; None where that is not known."""
    try:
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # a zombie is gone


def _namespace() -> str | None:
    """Which process numbers mean anything here: containers on one host have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


@contextlib.contextmanager
def _exclusive(path: pathlib.Path) -> Iterator[Any]:
    """The lock file, opened for reading and appending while nobody else looks at it."""
    while True:
        with open(path, "a+", encoding="utf-8", errors="replace", opener=files.no_links) as file:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.seek(0)
                yield file
                return
        # It was removed or replaced before it was ours.


def _text(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _acquire(lock: Lock) -> None:
    path = lock.path
    silent: tuple[Any, float] | None = None  # the holder's last sign, and since when there was none
    while True:
        with _exclusive(path) as file:
            text = file.read()
            holder = parsed(text)
            sign = (text, os.fstat(file.fileno()).st_mtime_ns)
            silent = (sign, time.monotonic()) if silent is None else silent
            alive = is_alive(holder)
            if alive is None and sign == silent[0] and time.monotonic() - silent[1] >= PATIENCE:
                alive = False
            if holder is None or alive is False:
                if holder is not None:
                    logging.warning("%s was left behind by %s; taken over", path, name_of(holder))
                file.truncate(0)
                file.write(lock.text)
                return
            if alive or sign != silent[0]:
                raise ConfigError(in_use(path, holder))
        if time.monotonic() - silent[1] < 1:
            logging.warning(WAITING, path, name_of(holder), PATIENCE)
        time.sleep(1)


def parsed(text: str) -> dict[str, Any] | None:
    """The holder that a lock names; None if it was not written whole."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):  # empty, or killed while writing
        return None
    if not isinstance(holder, dict) or "host" not in holder:
        return None
    process = holder.get("process")
    return holder if isinstance(process, int) and 0 < process < 1 << 31 else None


def is_alive(holder: dict[str, Any] | None) -> bool | None:
    """Whether a holder's process still runs; None if that cannot be seen from here."""
    if holder is None:
        return False
    if (holder["host"], holder.get("namespace")) != (socket.gethostname(), _namespace()):
        return None
    pid = holder["process"]
    if pid == os.getpid():
        return holder.get("born") == _born(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.get("born") == _born(pid)


def name_of(holder: dict[str, Any]) -> str:
    """A holder in words."""
    return f"process {holder['process']} on {holder['host']} (since {holder.get('since')})"


def _beat(lock: Lock, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            if _text(lock.path) == lock.text:
                os.utime(lock.path)
