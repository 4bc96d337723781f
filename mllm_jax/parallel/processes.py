"""How the processes of a run find each other, and what they tell each other about host values.

Every process must call these at the same point.
"""

import hashlib
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mllm_jax.config import ConfigError

T = TypeVar("T")
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Joins the other processes of the run; comes before everything that touches a device.

    A launcher that JAX detects says who they are, or else the environment variables `ADDRESS` (which JAX reads itself),
    `COUNT` and `INDEX`.

    Raises:
      ConfigError: neither does; names the variables that are missing or wrong.
    """
    given = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
    for name, value in given.items():
        if value and not (":" in value if name == ADDRESS else value.isdecimal()):
            form = "HOST:PORT" if name == ADDRESS else "a number"
            raise ConfigError(f"--distributed: the environment variable {name} is {value!r}, not {form}")
    count, index = (int(given[name]) if given[name] else None for name in (COUNT, INDEX))
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        missing = [name for name, value in given.items() if not value]
        wrong = (
            f"{', '.join(missing)} not set, and JAX detects no launcher (Slurm, Open MPI, Kubernetes, Cloud TPU)"
            if missing
            else ", ".join(f"{name}={value}" for name, value in given.items())
        )
        raise ConfigError(
            f"--distributed: {wrong} (JAX: {error}); start the processes by such a launcher, or set for each "
            f"{ADDRESS}=HOST:PORT (of process 0, a free port), {COUNT} and {INDEX} (0, 1, ...); leave --distributed "
            "out on a single host"
        ) from error


def first_then_others(work: Callable[[], T], what: str) -> T:
    """Lets the first process do what writes files; the others follow and find it done, or do it on a disk of their own.

    Args:
      what: names the work, the same for every process.
    """
    for first in (True, False):
        if (jax.process_index() == 0) == first:
            done = work()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{what}: {first}")
    return done


def same(value: bytes) -> bool:
    """Whether all processes have the same bytes; all get the same answer."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(value).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    return bool((digests == digests[0]).all())


def total(count: int) -> int:
    """The sum of every process's count."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def agreed(wish: bool, now: bool) -> bool:
    """Whether to do what any process wishes; several processes come together to ask only where `now` is set.

    A process alone does as it wishes at once.
    """
    if jax.process_count() == 1:
        return wish
    return now and total(int(wish)) > 0
