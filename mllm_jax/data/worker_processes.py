"""Work in processes of their own, where threads would wait for one interpreter.

They are started by this module's name: multiprocessing would import the script that runs, and with it JAX, in each.

    python -m mllm_jax.data.worker_processes MODULE:FUNCTION DESCRIPTOR
"""

import contextlib
import copy
import importlib
import os
import pathlib
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any


@contextlib.contextmanager
def worker_processes(function: str, count: int, *common: Any) -> Iterator[Callable[[Any], Any]]:
    """A function that lets one of `count` processes do a task; for that many threads at once.

    The processes end with the block, and with this process however it ends.

    Args:
      function: "MODULE:NAME"; takes `common` and a task and gives its result, all of which can be pickled.
      common: what all tasks have in common; sent to each process once.

    Example:
      with worker_processes("math:comb", 2, 4) as choose:
          assert [n for _, n in map_in_order(choose, range(4), threads=2)] == [1, 4, 6, 4]
    """
    path = os.pathsep.join(
        filter(None, (str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
    # -P: -m would look for modules in the current folder first.
    command = [sys.executable, "-P", "-m", "mllm_jax.data.worker_processes", function]
    idle: queue.SimpleQueue = queue.SimpleQueue()

    def call(task: Any) -> Any:
        tasks = idle.get()
        try:
            tasks.send(task)
            done, result = tasks.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                "a process that prepares data ended early: give it more memory or fewer --workers, and the same "
                "command again"
            ) from error
        finally:
            idle.put(tasks)
        if not done:
            raise result
        return result

    with contextlib.ExitStack() as stack:
        for _ in range(count):
            tasks, far = Pipe()
            stack.callback(tasks.close)
            with far:
                process = subprocess.Popen(
                    [*command, str(far.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[far.fileno()],
                    # A tokenizer's own threads are no help to one text at a time.
                    env={"TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": path},
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            with contextlib.suppress(OSError):  # a process that has ended already is named by its first task
                tasks.send(common)
            idle.put(tasks)
        yield call


def main(function: str, descriptor: str) -> None:
    """Does the tasks of a connection, one after the other, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process says so
    module, _, name = function.partition(":")
    work = getattr(importlib.import_module(module), name)
    with Connection(int(descriptor)) as tasks, contextlib.suppress(EOFError, OSError):
        common = tasks.recv()
        while True:
            task = tasks.recv()
            try:
                tasks.send((True, work(*common, task)))
            except Exception as error:
                _send(tasks, error)


def _send(tasks: Connection, error: Exception) -> None:
    """Sends an error as it is, or in words if it cannot be rebuilt from its arguments."""
    try:
        copy.copy(error)
        tasks.send((False, error))
    except Exception:
        tasks.send((False, RuntimeError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    main(*sys.argv[1:])
