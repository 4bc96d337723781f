"""A whole parameter tree on disk (params only, deployable), written and read by Orbax."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from mllm_jax.parallel import processes
from mllm_jax.storage import Path, absolute, is_bucket, remove_folder

# The fix for damaged parameters of a finished stage.
REWRITE = (
    "move it and those of later stages away, and train.py's same command writes them again from the stages' last "
    "checkpoints"
)


class CheckpointError(ValueError):
    """A checkpoint that does not fit the model or cannot be written; the message says why and the fix."""


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns whatever the storage layers raise (a full disk has many names) into one error."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"a checkpoint could not be written to {directory} ({type(error).__name__}: {error}); earlier checkpoints "
            "are intact: make room and give the same command again"
        ) from error


@contextlib.contextmanager
def reading(directory: Path, fix: str) -> Iterator[None]:
    """Turns whatever the storage layers raise at damaged files into one error."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):  # too little memory is no damage
        raise
    except Exception as error:
        cause = error.__cause__ or error
        said = ": ".join(
            [type(cause).__name__, *str(cause).splitlines()[:1]]
        )  # it may be pages long, or empty
        raise CheckpointError(f"checkpoint {directory} cannot be read ({said[:300]}); {fix}") from error


def first_difference(saved: Any, wanted: Any) -> str | None:
    """What first differs between two trees of arrays or shapes, in words; None if shapes all agree."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {_name(path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}

    have, want = shapes(saved), shapes(wanted)
    for name in sorted(have.keys() | want.keys()):
        if name not in want:
            return f"{name} {have[name]} is in the checkpoint but not in the model"
        if name not in have:
            return f"{name} {want[name]} is in the model but not in the checkpoint"
        if have[name] != want[name]:
            return f"{name} is {have[name]} in the checkpoint and {want[name]} in the model"
    return None


def _name(path: tuple) -> str:
    parts = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    return "/".join(parts)


def is_complete(directory: Path) -> bool:
    """Whether `save_params` has written all of a folder, which in a bucket is there before it is."""
    if not is_bucket(directory):
        return directory.exists()
    import orbax.checkpoint as ocp  # slow to import

    return ocp.utils.is_checkpoint_finalized(directory)


def save_params(directory: Path, params: Any) -> None:
    """Writes a whole parameter tree (params only, deployable); visible only when complete.

    Raises:
      CheckpointError: it cannot be written.
    """
    import orbax.checkpoint as ocp  # slow to import

    with processes.together(f"room made for {directory.name}"):
        if jax.process_index() == 0:
            # left by a run killed here
            torn = [*directory.parent.glob(f"{directory.name}.orbax-checkpoint-tmp*")]
            if is_bucket(directory) and directory.exists() and not is_complete(directory):
                torn.append(directory)
            for folder in torn:
                remove_folder(folder)
    with writing(directory), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(directory), params)


def load_params(directory: Path, like: Any) -> Any:
    """Reads a parameter tree written by `save_params`.

    Args:
      like: ShapeDtypeStructs, with shardings if wanted.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: the checkpoint holds other parameters (the first difference is named) or cannot be read.
    """
    if not is_complete(directory):
        raise FileNotFoundError(f"no parameters at {directory}; train the stage first or give another path")
    import orbax.checkpoint as ocp  # slow to import

    with ocp.StandardCheckpointer() as checkpointer:
        with reading(directory, REWRITE):
            saved = checkpointer.metadata(absolute(directory)).item_metadata
        # metadata that cannot be read is None; then reading fails below
        if saved is not None and (difference := first_difference(saved.tree, like)):
            raise CheckpointError(
                f"checkpoint {directory} does not fit this model: {difference}; use the configuration that wrote it"
            )
        with reading(directory, REWRITE):
            return checkpointer.restore(absolute(directory), like)
