"""Weights & Biases and trackio beside TensorBoard: the same figures, sent to a service that a recipe names.

A service is never needed: what it raises, without network say, is told once, and training goes on without it.
`metrics.jsonl` has everything all the same.
"""

import contextlib
import importlib
import importlib.util
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from mllm_jax import files
from mllm_jax.config import ConfigError, resolved
from mllm_jax.console import make_console, say
from mllm_jax.storage import Path, is_bucket, read_text

FILE = (
    "tracking.json"  # under which id a service knows the run, so that a continued run is the same one there
)
PATIENCE = 60.0  # seconds that a service may take for the last figures

Log = Callable[[str, Mapping[str, float | int]], None]  # stage and figures, "step" among them


class Tracker(NamedTuple):
    """An open run at a service: what takes figures, and what ends it."""

    log: Log
    finish: Callable[[], None]


def check_tracking(config: ConfigDict) -> None:
    """Raises ConfigError where the package of the chosen service is not installed."""
    service = config.tracking.service
    if service != "none" and importlib.util.find_spec(service) is None:
        raise ConfigError(
            f"config key 'tracking.service' is {service!r}, whose package is not installed: pip install "
            f"'mllm-jax[{service}]', or give --config.tracking.service=none"
        )


@contextlib.contextmanager
def tracked(config: ConfigDict, workdir: Path) -> Iterator[Log]:
    """Opens the run at the recipe's service; gives what takes its figures, which never raises.

    Only the first process sends anything.
    """
    service = config.tracking.service
    if service == "none" or jax.process_index():
        yield lambda stage, figures: None
        return
    console, opened = make_console(), []

    def attempt(work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # of another library and of the network: anything
            opened.clear()
            say(console, f"no more is sent to {service} ({type(error).__name__}: {error})", "yellow")

    def log(stage: str, figures: Mapping[str, float | int]) -> None:
        if opened:
            attempt(lambda: opened[0].log(stage, figures))

    attempt(lambda: opened.append(SERVICES[service](config, workdir, _identity(workdir))))
    try:
        yield log
    finally:
        if opened:
            ending = threading.Thread(target=attempt, args=(opened[0].finish,), daemon=True)
            ending.start()
            ending.join(PATIENCE)
            if ending.is_alive():
                say(console, f"{service} has not taken the last figures after {PATIENCE:.0f} s", "yellow")


def _identity(workdir: Path) -> str:
    """The run's id at a service, made at its first start."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(read_text(workdir / FILE))["id"])
    made = secrets.token_hex(4)
    files.write_json(workdir / FILE, {"id": made})
    return made


def _wandb(config: ConfigDict, workdir: Path, identity: str) -> Tracker:
    wandb = importlib.import_module("wandb")
    run = wandb.init(
        project=config.tracking.project,
        id=identity,
        name=workdir.name,
        config=resolved(config),
        dir=None if is_bucket(workdir) else str(workdir),
        resume="allow",
    )
    for stage in config.stage_order:  # each counts its steps from 1, and wandb's own never go back
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return Tracker(lambda stage, figures: run.log(_named(stage, figures)), run.finish)


def _trackio(config: ConfigDict, workdir: Path, identity: str) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project=config.tracking.project,
        name=f"{workdir.name}-{identity}",  # by which trackio finds a run again
        config=resolved(config),
        resume="allow",
    )

    def log(stage: str, figures: Mapping[str, float | int]) -> None:
        trackio.log(_named(stage, figures), step=int(figures["step"]))

    return Tracker(log, trackio.finish)


def _named(stage: str, figures: Mapping[str, float | int]) -> dict[str, float | int]:
    return {f"{stage}/{key}": value for key, value in figures.items()}


SERVICES = {"wandb": _wandb, "trackio": _trackio}
