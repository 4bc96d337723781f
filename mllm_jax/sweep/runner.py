"""Runs the cells of a sweep: what is missing, several at once, beside other workers on the same directory."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from mllm_jax.config import ConfigError
from mllm_jax.files import no_links
from mllm_jax.storage import Path, is_bucket
from mllm_jax.sweep.cells import Cell, is_done
from mllm_jax.sweep.claims import Claims

WAITING, RUNNING, ELSEWHERE, DONE, FAILED = "waiting", "running", "elsewhere", "done", "failed"
POLL = 0.5  # seconds
LOOK, LOOK_BUCKET = 3.0, 60.0  # seconds between two looks at the cells of other workers
TAIL = 6  # lines of a failed cell's log that are shown


@dataclasses.dataclass
class Status:
    """Where a cell is.

    Attributes:
      state: one of the constants above; `ELSEWHERE`: another worker, or a program of its own, has it.
      log: of its program, once one was started here.
      since: when it was started, in seconds (`time.monotonic`); took: how long it ran.
      reason: why it failed.
    """

    state: str = WAITING
    log: pathlib.Path | None = None
    since: float = 0.0
    took: float = 0.0
    reason: str = ""


@dataclasses.dataclass
class _Program:
    cell: Cell
    process: subprocess.Popen
    claim: contextlib.ExitStack


class Stopped(Exception):
    """The sweep was asked to stop (SIGINT, SIGTERM); the argument is the signal's number."""


class Runner:
    """Runs cells until none is left.

    Attributes:
      states: cell's name -> where it is.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        directory: Path,
        recipe: str,
        command: Callable[[Cell], list[str]],
        workers: int = 1,
        log_of: Callable[[Cell], pathlib.Path] | None = None,
        watch: Callable[["Runner"], None] = lambda runner: None,
    ):
        """Takes what is to be run.

        Args:
          recipe: FILE.py:ARGUMENT, noted with each cell.
          command: the program of a cell with its arguments.
          workers: cells at once.
          log_of: where a program's output goes; `train.log` in its work directory if None.
          watch: called now and then, and at every change.
        """
        self.cells = list(cells)
        self.states = {cell.name: Status() for cell in cells}
        self._directory, self._command, self._workers, self._watch = directory, command, workers, watch
        self._log_of = log_of or (lambda cell: pathlib.Path(cell.workdir(directory)) / "train.log")
        self._claims, self._next_look = Claims(directory, recipe), 0.0
        self._running: dict[str, _Program] = {}

    def run(self) -> None:
        """Runs what is not done. A cell that fails is not tried again, and stops no other.

        Raises:
          Stopped: by a signal; the programs were asked to stop and have ended.
        """
        for cell in self.cells:
            if is_done(cell, self._directory):
                self._claims.note(cell)  # a program of its own (`--emit`) leaves none
                self.states[cell.name].state = DONE
        with _signals() as received:
            try:
                while not self._is_over():
                    self._reap()
                    self._fill()
                    self._watch(self)
                    if received:
                        raise Stopped(received[0])
                    time.sleep(POLL)
                self._watch(self)
            finally:
                self._stop()

    def _is_over(self) -> bool:
        return all(status.state in (DONE, FAILED) for status in self.states.values())

    def _fill(self) -> None:
        """Starts cells while workers are free: those that nobody claims first, then what may be left behind."""
        now = time.monotonic()
        states = {WAITING}
        if now >= self._next_look:
            states.add(ELSEWHERE)
            self._next_look = now + (LOOK_BUCKET if is_bucket(self._directory) else LOOK)
        for look in (False, True):
            for cell in self.cells:
                if len(self._running) >= self._workers:
                    return
                status = self.states[cell.name]
                if status.state not in states:
                    continue
                if claim := self._claims.take(cell, look):
                    self._start(cell, claim)
                elif self._is_done(cell):
                    status.state = DONE
                elif status.state == WAITING:
                    status.state = ELSEWHERE

    def _is_done(self, cell: Cell) -> bool:
        """Whether a cell is done; what it cannot be makes it a failed one."""
        try:
            return is_done(cell, self._directory)
        except ConfigError as error:
            self.states[cell.name].reason = str(error)
            self.states[cell.name].state = FAILED
            return False

    def _start(self, cell: Cell, claim: contextlib.ExitStack) -> None:
        status = self.states[cell.name]
        if self._is_done(cell):  # by another worker, since the last look
            status.state = DONE
        if status.state != FAILED:
            self._claims.note(cell)
        if status.state in (DONE, FAILED):
            claim.close()
            return
        status.log, status.since = self._log_of(cell), time.monotonic()
        command = self._command(cell)
        arguments = [sys.executable, "-m", "mllm_jax.sweep.child", str(os.getpid()), *command]
        try:
            status.log.parent.mkdir(parents=True, exist_ok=True)
            with open(status.log, "ab", opener=no_links) as log:
                log.write(f"$ {shlex.join(command)}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            claim.close()
            status.state, status.reason = FAILED, str(error)
            return
        status.state = RUNNING
        self._running[cell.name] = _Program(cell, process, claim)

    def _reap(self) -> None:
        """Takes the programs that have ended out of the running ones."""
        for name, program in list(self._running.items()):
            code, status = program.process.poll(), self.states[name]
            if code is None:
                continue
            del self._running[name]
            status.took = time.monotonic() - status.since
            done = code == 0 and self._is_done(program.cell)
            status.state = DONE if done else FAILED
            if not done and not status.reason:
                status.reason = f"exit status {code}" if code else "it ended without finishing the run"
            program.claim.close()

    def _stop(self) -> None:
        """Asks all programs to stop, waits for them and gives their claims back."""
        for program in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.process.pid, signal.SIGTERM)
        for program in self._running.values():
            program.process.wait()
            program.claim.close()
        self._running.clear()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that gets the numbers of signals that ask to stop; a second one ends this process."""
    received: list[int] = []

    def take(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_lines(path: pathlib.Path | None, count: int = TAIL) -> list[str]:
    """The last lines of a log that say something; of a progress bar that was drawn again and again, the last state."""
    try:
        data = path.read_bytes()[-20_000:] if path else b""
    except OSError:
        return []
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in data.decode("utf-8", "replace").split("\n")]
    return [line for line in lines if line.strip()][-count:]
