"""Checkpoints: which are kept, what a kill or a full disk does to them, and that they fit the model."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import checkpoint_writer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mllm_jax.interop import saved_params
from mllm_jax.interop.saved_params import CheckpointError, load_params, save_params
from mllm_jax.training.checkpoint import StageCheckpoints
from mllm_jax.training.step import TrainState, init_state

WRITER = pathlib.Path(__file__).parent / "checkpoint_writer.py"
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def make_state(step, shape=(3, 4), name="kernel"):
    params = {"connector": {"fc1": {name: jnp.full(shape, float(step)), "bias": jnp.arange(4.0)}}}
    return init_state(params, OPTIMIZER).replace(step=jnp.int32(step))


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_all(directory, losses, keep_last, keep_best):
    checkpoints = StageCheckpoints(directory, keep_last, keep_best)
    for step, loss in enumerate(losses, 1):
        checkpoints.save(make_state(step), {"next_batch": step}, loss)
    checkpoints.close()


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(2, 1, [2, 5, 6]), (1, 2, [2, 3, 6]), (2, 0, [5, 6]), (3, 1, [2, 4, 5, 6])],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep_last, keep_best, kept):
    save_all(tmp_path / "stage", [3.0, 1.0, 1.5, float("inf"), 2.0, 2.5], keep_last, keep_best)
    assert StageCheckpoints(tmp_path / "stage", keep_last, keep_best).steps() == kept
    assert sorted(int(path.name) for path in (tmp_path / "stage").iterdir()) == kept


def test_a_new_process_restores_state_and_position(tmp_path):
    save_all(tmp_path / "stage", [3.0, 2.0], 2, 1)
    checkpoints = StageCheckpoints(
        tmp_path / "stage", 2, 1
    )  # as a new process does: it knows nothing of the save
    state, position = checkpoints.restore(2, like(make_state(0)))
    assert isinstance(state, TrainState)
    assert position == {"next_batch": 2}
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    checkpoints.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            make_state(0, (3, 5)),
            r"connector/fc1/kernel is \(3, 4\) in the checkpoint and \(3, 5\) in the model",
        ),
        (
            make_state(0, name="weight"),
            r"connector/fc1/kernel \(3, 4\) is in the checkpoint but not in the model",
        ),
    ],
)
def test_another_model_is_refused_and_its_first_difference_named(tmp_path, other, message):
    save_all(tmp_path / "stage", [3.0], 1, 1)
    checkpoints = StageCheckpoints(tmp_path / "stage", 1, 1)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(1, like(other))
    checkpoints.close()


def test_damaged_files_are_one_error_with_a_way_out(tmp_path):
    save_all(tmp_path / "stage", [3.0, 2.0], 2, 1)
    save_params(tmp_path / "params", make_state(1).params)
    for directory in (tmp_path / "stage" / "2" / "state", tmp_path / "params"):
        for name in ("manifest.ocdbt", "_METADATA"):
            (directory / name).write_bytes(b"")
    checkpoints = StageCheckpoints(tmp_path / "stage", 2, 1)
    with pytest.raises(
        CheckpointError, match=r"checkpoint .*/stage/2 cannot be read .*; move it away"
    ) as error:
        checkpoints.restore(2, like(make_state(0)))
    assert "\n" not in str(error.value)
    state, _ = checkpoints.restore(1, like(make_state(0)))
    assert int(state.step) == 1
    checkpoints.close()
    with pytest.raises(CheckpointError, match=r"checkpoint .*/params cannot be read"):
        load_params(tmp_path / "params", like(make_state(1).params))


@pytest.mark.parametrize(
    ("error", "kind"),
    [(MemoryError(), MemoryError), (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), jax.errors.JaxRuntimeError),
     (AssertionError(), CheckpointError)],
)  # fmt: skip
def test_too_little_memory_is_not_taken_for_damage(tmp_path, error, kind):
    with pytest.raises(kind), saved_params.reading(tmp_path, "move it away"):
        raise error


def test_params_alone_are_written_and_read(tmp_path):
    params = make_state(7).params
    save_params(tmp_path / "params" / "pretrain", params)
    assert [path.name for path in (tmp_path / "params").iterdir()] == ["pretrain"]
    as_bfloat16 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    read = load_params(tmp_path / "params" / "pretrain", as_bfloat16)
    assert read["connector"]["fc1"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(read["connector"]["fc1"]["kernel"], np.float32), 7.0)


def test_params_of_another_model_or_none_are_errors(tmp_path):
    save_params(tmp_path / "p", make_state(1).params)
    with pytest.raises(
        CheckpointError, match=r"connector/fc1/kernel is \(3, 4\) in the checkpoint and \(2, 4\)"
    ):
        load_params(tmp_path / "p", like(make_state(1, (2, 4)).params))
    with pytest.raises(FileNotFoundError, match=r"no parameters at .*/q; train the stage first"):
        load_params(tmp_path / "q", like(make_state(1).params))


def run_writer(directory, environment, mode, **options):
    return subprocess.Popen(
        [sys.executable, str(WRITER), str(directory), mode],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def assert_restorable(directory, at_least):
    """The newest visible checkpoint is whole: all its values are those of its step."""
    checkpoints = StageCheckpoints(directory, 2, 0)
    steps = checkpoints.steps()
    assert steps
    assert steps[-1] >= at_least
    for step in steps:
        state, position = checkpoints.restore(step, like(checkpoint_writer.make_state(0)))
        assert position == {"next_batch": step}
        assert int(state.step) == step
        np.testing.assert_array_equal(state.params["connector"]["kernel"], checkpoint_writer.kernel(step))
    checkpoints.save(state.replace(step=state.step + 1), {"next_batch": 0}, 1.0)  # and life goes on
    checkpoints.close()
    names = {path.name for path in directory.iterdir()}
    assert names <= {str(step) for step in (*steps, steps[-1] + 1)}, "half-written checkpoints are cleaned up"


def test_a_kill_while_writing_leaves_the_checkpoints_before(tmp_path, script_environment):
    writer = run_writer(tmp_path / "stage", script_environment, "forever")
    try:
        done = 0
        while done < 3:  # in the middle of writing the next one, as far as chance has it
            done = int(writer.stdout.readline())
        time.sleep(0.02)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    assert_restorable(tmp_path / "stage", at_least=2)


def test_a_full_disk_is_one_error_and_leaves_the_checkpoints_before(tmp_path, script_environment):
    writer = run_writer(tmp_path / "stage", script_environment, "full")
    out, err = writer.communicate(timeout=300)
    assert writer.returncode == 0, err
    assert json.loads(out.splitlines()[-1]).startswith("a checkpoint could not be written to")
    assert "earlier checkpoints are intact" in out
    assert_restorable(tmp_path / "stage", at_least=1)
