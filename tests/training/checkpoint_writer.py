"""Writes checkpoints in a process of its own, to be killed or to run out of space: see test_checkpoint.py."""

import json
import pathlib
import resource
import sys

import jax.numpy as jnp
import numpy as np
import optax

from mllm_jax.interop.saved_params import CheckpointError
from mllm_jax.training.checkpoint import StageCheckpoints
from mllm_jax.training.step import init_state

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def kernel(step):
    """What the checkpoint of a step holds: values that do not compress, so that a limit on file sizes is met."""
    return np.random.default_rng(step).standard_normal((512, 512), np.float32)


def make_state(step):
    state = init_state({"connector": {"kernel": jnp.asarray(kernel(step))}}, OPTIMIZER)
    return state.replace(step=jnp.int32(step))


def main():
    directory, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
    checkpoints = StageCheckpoints(directory, 2, 0)
    if mode == "forever":
        step = 0
        while True:
            step += 1
            checkpoints.save(make_state(step), {"next_batch": step}, 1.0)
            print(len(checkpoints.steps()) and checkpoints.steps()[-1], flush=True)
    checkpoints.save(make_state(1), {"next_batch": 1}, 1.0)
    checkpoints._manager.wait_until_finished()
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, 4096)
    )  # a file that grows larger fails, as on a full disk
    try:
        checkpoints.save(make_state(2), {"next_batch": 2}, 1.0)
        checkpoints.close()
    except CheckpointError as error:
        print(json.dumps(str(error)))


if __name__ == "__main__":
    main()
