"""What a run tells while it trains: terminal, `metrics.jsonl`, TensorBoard, and a service (`training.tracking`).

`metrics.jsonl` is only ever appended to. A run that was killed and goes on from its last checkpoint repeats some
steps, so a step can stand there twice: readers take the last (`report.losses.read_metrics`). Only a line that a kill
or a full disk tore is removed; its step is repeated. In a bucket, where nothing can be appended, both kinds of log are
written again now and then and before every checkpoint (`sync`), so that none is missing that is not repeated.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mllm_jax.console import make_console, progress_bar, say
from mllm_jax.line_file import LineFile, whole_lines
from mllm_jax.parallel import processes
from mllm_jax.storage import Path
from mllm_jax.training.flops import StepFlops
from mllm_jax.training.tracking import Log


class NonFiniteLoss(FloatingPointError):
    """Training stopped at a loss or gradient that is not a number."""

    agreed = True  # see `parallel.endings`: all processes have the same metrics


@dataclasses.dataclass
class _Pending:
    step: int
    metrics: dict[str, Any]
    ids: list[str]


class RunLog:
    """Collects device metrics without waiting for the device and writes window means.

    Args:
      workdir: gets `metrics.jsonl` and `tensorboard/`.
      stage: name, written with every line.
      steps: steps of the stage.
      start: steps already done.
      write: False on all processes but the first.
      flops: model FLOPs of a step as a function of what its batch held (`training.flops`); None leaves speed in tokens.
      peak: operations per second of all devices, for MFU; None where it is not known.
      track: takes the figures too (`tracking.tracked`).

    Attributes:
      skipped: samples that this process has left out; `metrics.jsonl` has the sum over all processes.
    """

    def __init__(
        self,
        workdir: Path,
        stage: str,
        steps: int,
        start: int,
        write: bool = True,
        flops: StepFlops | None = None,
        peak: float | None = None,
        track: Log | None = None,
    ):
        self.stage = stage
        self._flops, self._peak, self._track = flops, peak, track
        self.window: list[_Pending] = []
        self._loss_sum = self._weight_sum = 0.0  # since the last checkpoint
        self.skipped = 0
        self._time = time.perf_counter()  # when the window began, later by what was not training
        self._file = LineFile(workdir / "metrics.jsonl")
        self._write = write
        from tensorboardX import SummaryWriter  # imports torch where that is installed, for seconds

        # What an earlier, killed run wrote about steps from here on is repeated.
        purge = start + 1 if start else None
        self._board = None
        with processes.together("metrics opened"):
            if write:
                self._board = SummaryWriter(str(workdir / "tensorboard" / stage), purge_step=purge)
            if write:
                whole_lines(self._file.path, repair=True)
        self._console = make_console()
        self._progress = progress_bar(self._console, show=write)
        self._task = self._progress.add_task(stage, total=steps, completed=start, shown="")
        self._progress.start()

    def add(self, step: int, metrics: dict[str, Any], ids: list[str], skipped: list[str]) -> None:
        """Takes one step's metrics (device arrays, not waited for) and its sample ids."""
        self.window.append(_Pending(step, metrics, ids))
        for message in skipped:
            self.skipped += 1
            say(self._console, f"skipped {message}", "yellow")
        self._progress.advance(self._task)

    def flush(self, learning_rate: float) -> dict[str, Any]:
        """Waits for the window's steps, checks and writes their means; all processes must come here together.

        Raises:
          NonFiniteLoss: naming the first step of the window whose loss or gradient is not finite, and its samples.
        """
        values = [
            {key: float(np.asarray(v)) for key, v in pending.metrics.items()} for pending in self.window
        ]
        now = time.perf_counter()
        for pending, value in zip(self.window, values, strict=True):
            if not value["finite"] or not math.isfinite(value["loss"]):
                self.close()
                raise NonFiniteLoss(
                    f"stage {self.stage!r}: loss {value['loss']} with gradient norm {value['grad_norm']} at step "
                    f"{pending.step}; its samples: {', '.join(i for i in pending.ids if i)}. Look at these samples "
                    "with `mllm-jax validate`, lower the learning rate or set model.dtype=float32; the last checkpoint "
                    "is intact."
                )
        weight = sum(value["loss_weight"] for value in values)
        loss_sum = sum(value["loss"] * value["loss_weight"] for value in values)
        tokens = sum(value["tokens"] for value in values)
        record = {
            "stage": self.stage,
            "step": self.window[-1].step,
            # the weighted mean over all supervised tokens of the window
            "loss": loss_sum / max(weight, 1e-8),
            "learning_rate": learning_rate,
            "tokens_per_second": tokens / (now - self._time),
            "step_seconds": (now - self._time) / len(values),
            "padding_share": 1 - tokens / sum(value["positions"] for value in values),
            "label_tokens": sum(value["label_tokens"] for value in values),
            "skipped": processes.total(self.skipped),
        }
        if self._flops:
            done = sum(self._flops(value) for value in values) / (now - self._time)
            record["model_flops_per_second"] = done
            if self._peak:
                record["mfu"] = done / self._peak
        record |= {
            key: float(np.mean([value[key] for value in values]))
            for key in values[0]
            if key.startswith("grad_norm")
        }
        self._loss_sum += loss_sum
        self._weight_sum += weight
        self.window.clear()
        self._time = now
        with processes.together(f"metrics of step {record['step']} written"):
            if self._write:
                self._file.append(json.dumps(record))
                for key, value in record.items():
                    if isinstance(value, float):
                        self._board.add_scalar(f"{self.stage}/{key}", value, record["step"])
        if self._track:
            self._track(self.stage, {key: value for key, value in record.items() if key != "stage"})
        self._progress.update(
            self._task,
            shown=f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tok/s  "
            f"padding {record['padding_share']:.0%}"
            + (f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""),
        )
        return record

    def loss_since_checkpoint(self) -> float:
        """Weighted mean loss over the supervised tokens since this was last called; infinite without any."""
        mean = self._loss_sum / self._weight_sum if self._weight_sum else math.inf
        self._loss_sum = self._weight_sum = 0.0
        return mean

    def sync(self) -> None:
        """Makes sure that what was written so far survives this process; comes before a checkpoint."""
        self._file.sync()
        if self._board is not None:
            self._board.flush()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the block out of the speed: compilation and waits for a checkpoint are not training."""
        begin, before = time.perf_counter(), self._time
        try:
            yield
        finally:  # also over a pause within
            self._time = before + time.perf_counter() - begin

    def close(self) -> None:
        """Ends the progress bar, the log and the event file."""
        self._progress.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()
