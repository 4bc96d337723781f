"""Which devices of its host a process takes, where a launcher leaves that open."""

import os
from collections.abc import Mapping

from mllm_jax.config import ConfigError


def local_devices(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Numbers of the GPUs that this process takes, for `jax.distributed.initialize`; None = as JAX decides.

    Under Slurm JAX gives each task one GPU, the one of its number on the node. So a single task on a node of 8 GPUs
    would leave 7 of them idle without a word; here it takes all of them.

    Raises:
      ConfigError: a node has several tasks, but not one for each of its GPUs.
    """
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    gpus, nodes = (environment.get(name, "") for name in ("SLURM_GPUS_ON_NODE", "SLURM_STEP_NUM_NODES"))
    known = gpus.isdecimal() and nodes.isdecimal() and int(nodes)
    if "JAX_LOCAL_DEVICE_IDS" in environment or not known or not all(name in environment for name in step):
        return None
    tasks, gpus = int(environment["SLURM_NTASKS"]) // int(nodes), int(gpus)
    if tasks == gpus or gpus == 0:
        return None
    if tasks == 1:
        return list(range(gpus))
    raise ConfigError(
        f"--distributed: Slurm has started {tasks} tasks on a node with {gpus} GPUs; start one task per GPU "
        f"(--ntasks-per-node={gpus}) or one per node (--ntasks-per-node=1), and bind no GPUs to tasks"
    )
