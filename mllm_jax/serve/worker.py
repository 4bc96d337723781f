"""The one thread that owns JAX: it drives the engines of all models, and runs what else needs a model in between."""

import collections
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from mllm_jax.serve.engine import Engine, Job, Update


class Worker:
    """Works while there is something to do, from `start` to `close`.

    Args:
      engines: those of all models; only the worker's thread touches them.
      deliver: told of updates, in that thread, once after each round.
    """

    def __init__(self, engines: Sequence[Engine], deliver: Callable[[list[Update]], None]):
        self._engines, self._deliver = engines, deliver
        self._changed = threading.Condition()
        self._jobs: collections.deque[tuple[Engine, Job]] = collections.deque()
        self._calls: collections.deque[tuple[Future, Callable[[], Any]]] = collections.deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="mllm-jax decode", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def submit(self, engine: Engine, job: Job) -> None:
        """Hands a job to an engine; its updates are delivered, also where the engine refuses it."""
        with self._changed:
            self._jobs.append((engine, job))
            self._changed.notify()

    def call(self, function: Callable[..., Any], *args: Any) -> Future:
        """What `function` returns when it has run in the worker's thread, between two steps."""
        future: Future = Future()
        with self._changed:
            self._calls.append((future, lambda: function(*args)))
            self._changed.notify()
        return future

    def wake(self) -> None:
        """Has it look again, after a job was cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread after its present round; jobs that are left get no answer."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._jobs or self._calls or self._busy()):
                    self._changed.wait()
                if self._closing:
                    return
                jobs, self._jobs = self._jobs, collections.deque()
                call = self._calls.popleft() if self._calls else None
            updates = []
            for engine, job in jobs:
                try:
                    engine.submit(job)
                except ValueError as error:
                    updates.append(Update(job, error=error))
            if call is not None:
                self._answer(*call)
            for engine in self._engines:
                if not engine.idle:
                    updates += engine.work()
            if updates:
                self._deliver(updates)

    def _busy(self) -> bool:
        return any(not engine.idle for engine in self._engines)

    @staticmethod
    def _answer(future: Future, function: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
