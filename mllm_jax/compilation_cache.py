"""Compiled programs are kept on disk, so that a script that is started again need not compile them again."""

import os
import pathlib

import jax

DEFAULT = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mllm_jax", "xla")
MOST_BYTES = 4 << 30  # then what was not used for longest is removed


def use(folder: str) -> str | None:
    """Keeps compiled programs in a folder from now on, and takes them from there.

    What decides a program is part of its name there: the computation, JAX's version, the kind of device (of a CPU, its
    instructions), and compiler flags. Several processes may use one folder: with a limit on its size, JAX locks it.
    A file there is machine code that is run, so the folder must belong to the user alone; one that is made here does.

    Args:
      folder: "" = keep nothing. Where `JAX_COMPILATION_CACHE_DIR` is set, JAX's own settings hold instead.

    Returns:
      Why nothing is kept, if the folder cannot be used; else None.
    """
    if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    try:
        path = pathlib.Path(folder).expanduser().absolute()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        return f"compiled programs are not kept: {error}"
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return (
            f"compiled programs are not kept: others may write to {path}, and would run what they like here"
        )
    if not os.access(path, os.W_OK):
        return f"compiled programs are not kept: {path} cannot be written to"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # a hundred small ones add up
    return None
