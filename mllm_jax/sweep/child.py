"""Becomes a cell's program, which is asked to stop when the sweep that started it is gone, however that ended.

    python -m mllm_jax.sweep.child PARENT PROGRAM ARGUMENT...

Linux sends SIGTERM, upon which train.py saves a checkpoint; elsewhere a program that is left alone goes on.
"""

import contextlib
import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2); it stays set when another program is loaded


def main(parent: str, *command: str) -> None:
    """Runs `command` in the place of this process."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(f"process {parent}, which started this, is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
