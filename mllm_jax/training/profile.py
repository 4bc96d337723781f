"""A trace of some steps, as XProf and TensorBoard's profile page read it."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from mllm_jax import files
from mllm_jax.storage import Path, is_bucket

NAME = "train"  # of a step in the trace, beside its number


class StepProfiler:
    """Traces steps of a stage in the first process, its host and its devices, into one folder.

    The first step of a process compiles, and the ones after it fill queues, so `start` should be some steps later.

    Example:
      profiler = StepProfiler(workdir / "profile" / "finetune", first=step + 10, steps=3)
      with profiler:
          for step in ...:
              with profiler.step(step):
                  state, metrics = train_step(state, batch)
              profiler.stop_after(step, metrics)
    """

    def __init__(self, folder: Path, first: int, steps: int):
        """Plans a trace; none is made if `first` is 0.

        Args:
          folder: for XProf's `--logdir`.
          first: number of the first step in it.
          steps: how many.
        """
        self._folder = folder
        self._first, self._last = (first, first + steps - 1) if first and jax.process_index() == 0 else (0, 0)
        self._into: pathlib.Path | None = None  # while a trace is made
        self._temporary = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Marks a step in the trace, which begins with the first one."""
        if number == self._first:
            self._into = self._local_folder()
            jax.profiler.start_trace(self._into)
        with jax.profiler.StepTraceAnnotation(NAME, step_num=number):
            yield

    def stop_after(self, number: int, metrics: Any) -> bool:
        """Ends the trace behind its last step, once the devices have computed it; returns whether it did."""
        if self._into is None or number != self._last:
            return False
        jax.block_until_ready(metrics)
        self._stop()
        return True

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
        with self._temporary:
            jax.profiler.stop_trace()
            if into != self._folder:
                for path in sorted(into.rglob("*")):
                    if path.is_file():
                        target = self._folder / path.relative_to(into).as_posix()
                        files.write_bytes(target, path.read_bytes())
