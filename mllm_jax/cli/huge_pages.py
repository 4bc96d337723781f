"""Starts a program once more with an allocator that asks Linux for huge pages.

XLA allocates its temporaries on a CPU anew in every step, and with pages of 4 KB a third of the time goes into page
faults. glibc reads the setting only when a process starts. This module imports nothing that is slow: what a script
imports before the second start, it imports twice.
"""

import contextlib
import importlib.util
import os
import sys

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def start_again() -> None:
    """Does it, unless the environment sets the variable already, or the program cannot be left.

    That is a program with a debugger, with connections to other processes, or with a plugin for accelerators.
    """
    jax = sys.modules.get("jax")
    started = sys.gettrace() is not None or (jax is not None and jax.distributed.is_initialized())
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    accelerated = (
        plugins and os.environ.get("JAX_PLATFORMS") != "cpu"
    )  # libtpu also plans TPUs that are not here
    if sys.platform == "linux" and VARIABLE not in os.environ and not started and not accelerated:
        os.environ[VARIABLE] = VALUE
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # slower, but it runs
            os.execv(sys.executable, sys.orig_argv)
