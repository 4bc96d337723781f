"""A lock that keeps two runs out of one work directory.

The file `lock` names the host and the process that hold the directory. It is removed when they are done. One that was
left behind is taken over:

* on the same host when its process is gone (or another program has got its number);
* on another host, or in another container, whose processes cannot be looked up, when it shows no sign of life for
  `PATIENCE` seconds. A holder touches the file every `BEAT` seconds; what counts is that the file's time changes
  while one waits, so clocks need not agree.
"""

import contextlib
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

BEAT = 10.0
PATIENCE = 45.0


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Holds `directory`, which exists, for the duration of the block.

    Raises:
      ConfigError: another process holds it; names the process and its host.
    """
    path = directory / "lock"
    mine = json.dumps(_this_process())
    _acquire(path, mine)
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, mine, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with _exclusive(path) as file:
            if file.read() == mine:
                path.unlink()


def _this_process() -> dict[str, Any]:
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
        with open(path, "a+", encoding="utf-8", opener=files.no_links) as file:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.seek(0)
                yield file
                return
        # It was removed or replaced before it was ours.


def _acquire(path: pathlib.Path, mine: str) -> None:
    silent: tuple[Any, float] | None = None  # the holder's last sign, and since when there was none
    while True:
        with _exclusive(path) as file:
            text = file.read()
            holder = _parsed(text)
            sign = (text, os.fstat(file.fileno()).st_mtime_ns)
            silent = (sign, time.monotonic()) if silent is None else silent
            alive = _alive(holder)
            if alive is None and sign == silent[0] and time.monotonic() - silent[1] >= PATIENCE:
                alive = False
            if holder is None or alive is False:
                if holder is not None:
                    logging.warning("%s was left behind by %s; taken over", path, _name(holder))
                file.truncate(0)
                file.write(mine)
                return
            if alive or sign != silent[0]:
                raise ConfigError(
                    f"{path.parent} is in use by {_name(holder)}; wait for it, stop it or choose another --workdir "
                    f"(if that process is gone, delete {path})"
                )
        if time.monotonic() - silent[1] < 1:
            logging.warning("%s names %s; waiting %d s for a sign of life", path, _name(holder), PATIENCE)
        time.sleep(1)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(text)
    except ValueError:  # empty, or killed while writing
        return None
    return holder if isinstance(holder, dict) and {"host", "process"} <= holder.keys() else None


def _alive(holder: dict[str, Any] | None) -> bool | None:
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


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} on {holder['host']} (since {holder.get('since')})"


def _beat(path: pathlib.Path, mine: str, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == mine:
                os.utime(path)
