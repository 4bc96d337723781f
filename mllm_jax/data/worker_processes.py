"""Work in processes of their own, where threads would wait for one interpreter.

They are started by this module's name: multiprocessing would import the script that runs, and with it JAX, in each.

    python -m mllm_jax.data.worker_processes MODULE:FUNCTION
"""

import contextlib
import importlib
import os
import pathlib
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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
    fresh: set[subprocess.Popen] = set()
    told = pickle.dumps(common)

    def call(task: Any) -> Any:
        process = idle.get()
        try:
            if process in fresh:
                process.stdin.write(told)
                fresh.remove(process)
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            done, result = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                "a process that prepares data ended early: give it more memory or fewer --workers, and the same "
                "command again"
            ) from error
        finally:
            idle.put(process)
        if not done:
            raise result
        return result

    with contextlib.ExitStack() as stack:
        for _ in range(count):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONPATH": path})
            stack.callback(_end, process)
            fresh.add(process)
            idle.put(process)
        yield call


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()


def main(function: str) -> None:
    """Does tasks from standard input, one after the other, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process says so
    tasks, results = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what is printed is no result
    module, _, name = function.partition(":")
    work = getattr(importlib.import_module(module), name)
    with contextlib.suppress(EOFError, BrokenPipeError):
        common = pickle.load(tasks)
        while True:
            task = pickle.load(tasks)
            try:
                answer = pickle.dumps((True, work(*common, task)))
            except Exception as error:
                answer = _pickled(error)
            results.write(answer)
            results.flush()


def _pickled(error: Exception) -> bytes:
    """An error as it is, or in words if it cannot be rebuilt from its arguments."""
    try:
        data = pickle.dumps((False, error))
        pickle.loads(data)
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
    return data


if __name__ == "__main__":
    main(sys.argv[1])
