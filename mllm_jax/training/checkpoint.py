"""Orbax checkpoints of a stage (state and data position together) and of whole parameter trees."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from mllm_jax.training.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint that does not fit the model or cannot be written; the message says why and the way out."""


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
    """Turns whatever the storage layers raise (a full disk has many names) into one error."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"a checkpoint could not be written to {directory} ({type(error).__name__}: {error}); earlier checkpoints "
            "are intact: make room and give the same command again"
        ) from error


@contextlib.contextmanager
def _reading(directory: pathlib.Path, way_out: str) -> Iterator[None]:
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
        raise CheckpointError(f"checkpoint {directory} cannot be read ({said[:300]}); {way_out}") from error


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


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


class StageCheckpoints:
    """The checkpoints of one stage: written in the background, the newest and the best kept.

    A checkpoint becomes visible only when it is complete (Orbax renames it last), so a killed run or a full disk
    leaves the earlier ones as they were.

    Args:
      directory: of this stage.
      keep_last, keep_best: how many of the newest, and how many with the lowest `loss`, are kept.
    """

    def __init__(self, directory: pathlib.Path, keep_last: int, keep_best: int):
        policies = [preservation.LatestN(keep_last)]
        if keep_best:
            policies.append(preservation.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=keep_best))
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            # Named here, so that a new process can read what a checkpoint holds before it restores it.
            item_handlers={"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation.AnyPreservationPolicy(policies),
                best_fn=lambda metrics: metrics["loss"],
                best_mode="min",
                cleanup_tmp_directories=True,  # what a killed run left half-written
            ),
        )

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data_state: dict[str, Any], loss: float) -> None:
        """Starts writing; waits only for an earlier write.

        Raises:
          CheckpointError: this or the earlier write failed.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(data_state)
        )
        with _writing(self.directory):
            self._manager.save(int(state.step), args=args, metrics={"loss": float(loss)})

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position of a step.

        Args:
          like: shapes, dtypes and shardings wanted.

        Raises:
          CheckpointError: the checkpoint holds other parameters or cannot be read.
        """
        way_out = "move it away, and the same command goes on from the one before"
        with _reading(self.directory / str(step), way_out):
            saved = self._manager.item_metadata(step)["state"]
        if saved is not None:
            difference = first_difference(saved["params"], like.params)
            if difference:
                raise CheckpointError(
                    f"checkpoint {self.directory}/{step} does not fit this model: {difference}; use the "
                    "configuration that wrote it, or another workdir"
                )
        with _reading(self.directory / str(step), way_out):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(_as_dict(like)), data=ocp.args.JsonRestore()
                ),
            )
        return TrainState(**restored["state"]), restored["data"]

    def close(self) -> None:
        """Waits for the last write.

        Raises:
          CheckpointError: it failed.
        """
        with _writing(self.directory):
            self._manager.wait_until_finished()
            self._manager.close()


def save_params(directory: pathlib.Path, params: Any) -> None:
    """Writes a whole parameter tree (params only, deployable); visible only when complete.

    Raises:
      CheckpointError: it cannot be written.
    """
    if jax.process_index() == 0:
        for torn in directory.parent.glob(f"{directory.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(torn)  # left by a run killed here
    with _writing(directory), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), params)


def load_params(directory: pathlib.Path, like: Any) -> Any:
    """Reads a parameter tree written by `save_params`.

    Args:
      like: ShapeDtypeStructs, with shardings if wanted.

    Raises:
      FileNotFoundError: nothing there.
      CheckpointError: the checkpoint holds other parameters (the first difference is named) or cannot be read.
    """
    if not directory.exists():
        raise FileNotFoundError(f"no parameters at {directory}; train the stage first or give another path")
    with ocp.StandardCheckpointer() as checkpointer:
        way_out = (
            "move it and those of later stages away, and train.py's same command writes them again from the stages' "
            "last checkpoints"
        )
        with _reading(directory, way_out):
            saved = checkpointer.metadata(directory.absolute()).item_metadata
        # metadata that cannot be read is None; then reading fails below
        if saved is not None and (difference := first_difference(saved.tree, like)):
            raise CheckpointError(
                f"checkpoint {directory} does not fit this model: {difference}; use the configuration that wrote it"
            )
        with _reading(directory, way_out):
            return checkpointer.restore(directory.absolute(), like)
