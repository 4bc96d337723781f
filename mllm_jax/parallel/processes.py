"""How the processes of a run find each other, and what they tell each other about host values.

Every process must call these at the same point.
"""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mllm_jax.config import ConfigError
from mllm_jax.parallel import endings
from mllm_jax.parallel.launchers import local_devices

T = TypeVar("T")
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Seconds after which a process that gives no sign of life is taken for dead and JAX ends the others. JAX's own 100 s
# would keep a pod for longer than a minute; signs are given by a thread of their own, also while XLA compiles.
HEARTBEAT = 40
DAY = 24 * 60 * 60 * 1000  # milliseconds
_meetings = itertools.count()  # a barrier's name may be used once


class OtherProcessError(RuntimeError):
    """Another process of the run could not do its part; its own message says why."""

    agreed = True  # see `endings`: that one knows


def join() -> None:
    """Joins the other processes of the run; comes before everything that touches a device.

    A launcher that JAX detects says who they are, or else the environment variables `ADDRESS` (which JAX reads itself),
    `COUNT` and `INDEX`.

    Raises:
      ConfigError: neither does; names the variables that are missing or wrong. Or the launcher leaves devices idle.
    """
    given = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
    for name, value in given.items():
        if value and not (":" in value if name == ADDRESS else value.isdecimal()):
            form = "HOST:PORT" if name == ADDRESS else "a number"
            raise ConfigError(f"--distributed: the environment variable {name} is {value!r}, not {form}")
    count, index = (int(given[name]) if given[name] else None for name in (COUNT, INDEX))
    devices = local_devices()
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=index,
            local_device_ids=devices,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
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
    endings.listen()


def first_then_others(work: Callable[[], T], what: str) -> T:
    """Lets the first process do what writes files; the others follow and find it done, or do it on a disk of their own.

    Args:
      what: names the work, the same for every process.

    Raises:
      OtherProcessError: `work` raised in another process; where it did, its own error is raised.
    """
    for first in (True, False):
        with together(f"{what}: {first}"):
            if (jax.process_index() == 0) == first:
                done = work()
    return done


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """What each process does for itself, here, and none goes on from before all have done it.

    The block must not contain anything that processes do with each other: where it fails in one of them, that part
    would wait for ever.

    Args:
      what: names the work, the same for every process.

    Raises:
      OtherProcessError: the block raised in another process; where it did, its own error is raised.
    """
    error = None
    try:
        yield
    except Exception as raised:  # the others are told, so that they do not wait for what never comes
        error = raised
    failed = _any_failed(error, what)
    if error is not None:
        raise endings.agreed(error)
    if failed:
        raise OtherProcessError(f"another process has failed ({what}); its message says why")


class Postponed:
    """Keeps an error of this process until all processes meet, where it ends them all.

    For work between meetings that processes do for themselves while their devices wait for each other. A single process
    has nobody to wait for, so its errors are raised at once.

    Example:
      late = Postponed()
      for step in range(steps):
          with late:
              read_something()
          compute_together()
          if step % 10 == 0:
              late.meet("read")
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if jax.process_count() == 1 or not isinstance(error, Exception):
            return False
        self._error = self._error or error
        return True

    def meet(self, what: str) -> None:
        """Waits for the other processes.

        Raises:
          OtherProcessError: another one has kept an error; the one that has raises its own.
        """
        with together(what):
            if self._error is not None:
                raise self._error


def _any_failed(error: Exception | None, name: str) -> bool:
    if jax.process_count() == 1:
        return error is not None
    if jax.distributed.is_initialized():
        from orbax.checkpoint import multihost  # slow to import

        # Waiting on the devices would end after 30 s on CPUs, and the first process may read a data set for hours.
        multihost.get_barrier_sync_fn()(key=f"{name} ({next(_meetings)})", timeout_ms=DAY)
    return total(int(error is not None)) > 0


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


def any_process(flag: bool, synchronize: bool) -> bool:
    """Whether `flag` is set in any process; several processes find out only where `synchronize` is set, else False.

    A single process gets its own flag at once.
    """
    if jax.process_count() == 1:
        return flag
    return synchronize and total(int(flag)) > 0
