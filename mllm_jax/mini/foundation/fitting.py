"""The loop that pretrains a part of the foundation: phases one after the other, logged and resumable."""

import dataclasses
import functools
import json
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mllm_jax.files import no_links
from mllm_jax.training.optimizer import muon_dimensions


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with data and learning rates of its own.

    Attributes:
      steps: how many it has, at most if there is an `until`.
      rates: (step of the phase, share of the peak rates), straight lines between.
      batches: the endless batches from a step of the phase on; the same ones whichever step it starts at.
      until: (name of a metric, value): the phase ends when the metric's mean over `log_every` steps reaches it.
    """

    steps: int
    rates: Sequence[tuple[int, int | float]]
    batches: Callable[[int], Iterator[Any]]
    until: tuple[str, float] | None = None

    def rate(self, step: int) -> np.float32:
        """The share of the peak rates at a step of the phase, counted from 0."""
        return np.float32(np.interp(step, *np.transpose(self.rates)))

    def over(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether it ends after so many steps, the last of which had these mean metrics."""
        reached = self.until is not None and metrics.get(self.until[0], -np.inf) >= self.until[1]
        return reached or step >= self.steps


def _optimizer(config: ConfigDict, params: Any) -> optax.GradientTransformation:
    """AdamW, or Muon for the matrices inside the blocks and Adam for embeddings, heads, norms and biases."""
    if config.optimizer == "adamw":
        decays = jax.tree.map(lambda x: x.ndim > 1, params)
        return optax.adamw(config.learning_rate, b2=config.b2, weight_decay=config.weight_decay, mask=decays)
    return optax.contrib.muon(
        config.matrix_learning_rate,
        weight_decay=config.weight_decay,
        adam_learning_rate=config.learning_rate,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=muon_dimensions,
    )


def _ahead(batches: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """Runs an endless iterator in a thread, until this one is closed; an error in it is raised here."""
    waiting: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item: Any) -> None:
        while not closed.is_set():
            try:
                return waiting.put(item, timeout=0.5)
            except queue.Full:
                continue

    def work():
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
        except Exception as error:
            put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item = waiting.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()


def fit(
    name: str,
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    params: Any,
    phases: Sequence[Phase],
    config: ConfigDict,
    workdir: pathlib.Path,
) -> Any:
    """Minimises `loss_fn(params, batch) -> (loss, metrics)`; resumes from the newest checkpoint in `workdir`.

    Metrics go to `metrics.jsonl` and to the terminal. A phase that ends by a metric ends at a multiple of `log_every`
    steps, so a resumed run ends it where one in a piece does.

    Args:
      config: `optimizer` and its rates, `log_every` and `save_every`.

    Raises:
      FloatingPointError: the loss is not finite.
      ValueError: `save_every` is no multiple of `log_every`.
    """
    if config.save_every % config.log_every:
        raise ValueError(f"save_every={config.save_every} is no multiple of log_every={config.log_every}")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), _optimizer(config, params))
    # The phase that is on, and the step at which it began.
    state = {"params": params, "opt": optimizer.init(params), "phase": np.zeros(2, np.int32)}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt, batch, rate):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt = optimizer.update(grads, opt, params)
        updates = jax.tree.map(lambda x: rate * x, updates)  # weight decay too
        return optax.apply_updates(params, updates), opt, metrics

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    workdir.mkdir(parents=True, exist_ok=True)
    with (
        ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options) as manager,
        open(workdir / "metrics.jsonl", "a", opener=no_links) as log,
    ):
        step = manager.latest_step() or 0
        if step:
            state = manager.restore(step, args=ocp.args.StandardRestore(state))
        params, opt = state["params"], state["opt"]
        number, begin = (int(x) for x in state["phase"])
        clock, since = time.time(), step
        while number < len(phases):
            phase, window, over = phases[number], [], False
            batches = _ahead(phase.batches(step - begin))
            while not over:
                params, opt, metrics = update(params, opt, next(batches), phase.rate(step - begin))
                window.append(metrics)
                step += 1
                over = step - begin >= phase.steps
                if step % config.log_every == 0 or over:
                    mean = {key: float(np.mean([m[key] for m in window])) for key in metrics}
                    window.clear()
                    if not np.isfinite(mean["loss"]):
                        raise FloatingPointError(f"{name}: loss is not finite before step {step}")
                    over = phase.over(step - begin, mean)
                    speed = (step - since) / (time.time() - clock)
                    record = {"step": step, "phase": number, **mean, "steps_per_second": speed}
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    shown = " ".join(
                        f"{key}={value:.3f}" for key, value in mean.items() if "count_" not in key
                    )
                    print(f"{name} {step} (phase {number}) {speed:.2f} steps/s {shown}", flush=True)
                if over:
                    number, begin = number + 1, step
                if step % config.save_every == 0 or number == len(phases):
                    state = {"params": params, "opt": opt, "phase": np.array([number, begin], np.int32)}
                    manager.save(step, args=ocp.args.StandardSave(state))
            batches.close()
    return params
