"""A trace of some steps, as XProf and TensorBoard's profile page read it."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mllm_jax import console, files
from mllm_jax.storage import Path, is_bucket

NAME = "train"  # of a step in the trace, beside its number


class StepProfiler:
    """Traces steps of a stage in the first process, its host and its devices, into one folder.

    The first step of a process compiles, and the ones after it fill queues, so `start` should be some steps later. What
    goes wrong with a trace (another one is under way, the disk is full) is told and costs the trace, not the run.

    Example:
      profiler = StepProfiler(workdir / "profile" / "finetune", first=step + 10, steps=3)
      with profiler:
          for step in ...:
              with profiler.step(step):
                  state, metrics = train_step(state, batch)
              profiler.stop_after(step, metrics)
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        steps: int,
        outside: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        """Plans a trace; none is made if `first` is 0.

        Args:
          folder: for XProf's `--logdir`.
          first: number of the first step in it.
          steps: how many.
          outside: a block for what is no part of any step: beginning, ending and writing the trace.
        """
        self._folder = folder
        self._first, self._last = (first, first + steps - 1) if first and jax.process_index() == 0 else (0, 0)
        self._outside = outside
        self._into: pathlib.Path | None = None  # while a trace is made
        self._temporary = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks a step in the trace, which begins with the first one."""
        if number == self._first:
            with self._or_lost():
                into = self._local_folder()
                jax.profiler.start_trace(into)
                self._into = into
        with jax.profiler.StepTraceAnnotation(NAME, step_num=number):
            yield

    def stop_after(self, number: int, metrics: Any) -> None:
        """Ends the trace behind its last step, once the devices have computed it."""
        if self._into is not None and number == self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._into is not None:  # the stage ends before the trace
            self._stop()

    def _local_folder(self) -> pathlib.Path:
        if is_bucket(self._folder):  # the profiler writes on this machine only
            return pathlib.Path(self._temporary.enter_context(tempfile.TemporaryDirectory()))
        return self._folder

    def _stop(self) -> None:
        into, self._into = self._into, None
        with self._or_lost(), self._temporary:
            jax.profiler.stop_trace()
            if into != self._folder:
                for path in sorted(into.rglob("*")):
                    if path.is_file():
                        target = self._folder / path.relative_to(into).as_posix()
                        files.write_bytes(target, path.read_bytes())

    @contextlib.contextmanager
    def _or_lost(self) -> Iterator[None]:
        with self._outside():
            try:
                yield
            except Exception as error:  # JAX, the disk and the bucket have their own
                console.complain(
                    f"the trace of steps {self._first} to {self._last} is lost, training goes on: "
                    f"{type(error).__name__}: {error}"
                )
