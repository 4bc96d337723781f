"""Orbax checkpoints of a stage: state and data position together."""

from typing import Any

from mllm_jax.interop.saved_params import CheckpointError, first_difference, reading, writing
from mllm_jax.parallel import endings
from mllm_jax.storage import Path, absolute
from mllm_jax.training.step import TrainState, first_not_finite


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


class StageCheckpoints:
    """The checkpoints of one stage: written in the background, the newest and the best kept.

    A checkpoint becomes visible only when it is complete (Orbax renames it last, or in a bucket marks it), so a killed
    run or a full disk leaves the earlier ones as they were.

    Args:
      directory: of this stage.
      keep_last, keep_best: how many of the newest, and how many with the lowest `loss`, are kept.
    """

    def __init__(self, directory: Path, keep_last: int, keep_best: int):
        import orbax.checkpoint as ocp  # slow to import
        from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

        policies = [preservation.LatestN(keep_last)]
        if keep_best:
            policies.append(preservation.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=keep_best))
        self.directory = absolute(directory)
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
          CheckpointError: the state is not finite, or this or the earlier write failed.
        """
        import orbax.checkpoint as ocp  # slow to import

        if name := first_not_finite(state):
            error = CheckpointError(
                f"{name} holds NaN or infinity after step {int(state.step)}, so this state is not saved; earlier "
                f"checkpoints in {self.directory} are intact: lower the learning rate or set model.dtype=float32"
            )
            raise endings.agreed(error)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_dict(state)), data=ocp.args.JsonSave(data_state)
        )
        with writing(self.directory):
            self._manager.save(int(state.step), args=args, metrics={"loss": float(loss)})

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position of a step.

        Args:
          like: shapes, dtypes and shardings wanted.

        Raises:
          CheckpointError: the checkpoint holds other parameters or cannot be read.
        """
        import orbax.checkpoint as ocp  # slow to import

        fix = "move it away, and the same command goes on from the one before"
        with reading(self.directory / str(step), fix):
            saved = self._manager.item_metadata(step)["state"]
        if saved is not None:
            difference = first_difference(saved["params"], like.params)
            if difference:
                raise CheckpointError(
                    f"checkpoint {self.directory}/{step} does not fit this model: {difference}; use the "
                    "configuration that wrote it, or another workdir"
                )
        with reading(self.directory / str(step), fix):
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
        with writing(self.directory):
            self._manager.wait_until_finished()
            self._manager.close()
