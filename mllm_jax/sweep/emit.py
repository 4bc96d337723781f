"""A sweep as text for others to run: commands, a Slurm array or Kubernetes jobs, one program per cell."""

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Sequence

from mllm_jax.sweep.cells import Cell

FORMS = ("commands", "slurm", "kubernetes")
Command = Callable[[Cell], list[str]]

SLURM = """#!/usr/bin/env bash
# Cells of {recipe}: {count}, one per task of the array. Edit the resources, then: sbatch THIS_FILE
# Started again, it continues what was stopped and passes over what is done. On several nodes add --distributed.
#SBATCH --job-name={title}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={title}-%A_%a.log
set -euo pipefail

cells=(
{cells}
)
srun --kill-on-bad-exit=1 bash -c "${{cells[$SLURM_ARRAY_TASK_ID]}}"
"""


def emit(form: str, cells: Sequence[Cell], command: Command, recipe: str, image: str) -> str:
    """The text.

    Args:
      form: one of `FORMS`.
      command: the program of a cell, with arguments.
      recipe: as given to --config.
      image: container image of Kubernetes jobs.
    """
    title = kubernetes_name(re.sub(r".*/", "", recipe).replace(".py", "").replace(":", "-").replace("_", "-"))
    commands = [shlex.join(command(cell)) for cell in cells]
    if form == "commands":
        return "".join(f"{line}\n" for line in commands)
    if form == "slurm":
        lines = "\n".join(
            f"    {shlex.quote(line)} # {cell.name}" for line, cell in zip(commands, cells, strict=True)
        )
        return SLURM.format(count=len(cells), recipe=recipe, title=title, last=len(cells) - 1, cells=lines)
    return "---\n".join(_job(title, cell, command(cell), image) for cell in cells)


def _job(title: str, cell: Cell, command: list[str], image: str) -> str:
    """A Kubernetes Job; text in YAML is JSON."""
    arguments = "".join(f"            - {json.dumps(argument)}\n" for argument in command)
    return f"""apiVersion: batch/v1
kind: Job
metadata:
  name: {kubernetes_name(f"{title}-{cell.name}")}
spec:
  backoffLimit: 20 # a lost pod is started again and continues
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 180 # SIGTERM saves a checkpoint
      containers:
        - name: train
          image: {json.dumps(image)}
          workingDir: /mllm-jax
          command:
{arguments}          resources:
            limits:
              nvidia.com/gpu: 8
          volumeMounts:
            - {{name: shared, mountPath: /shared}}
            - {{name: memory, mountPath: /dev/shm}}
      volumes:
        - {{name: shared, persistentVolumeClaim: {{claimName: shared}}}}
        - {{name: memory, emptyDir: {{medium: Memory}}}}
"""


def kubernetes_name(text: str) -> str:
    """A name as Kubernetes takes it: lower case, letters, digits and dashes, 63 characters at most.

    Where something is lost, a digest of the whole keeps names apart.

    Example:
      >>> kubernetes_name("study-q_former-36-84px-seed0")
      'study-q-former-36-84px-seed0-2306'
    """
    plain = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
    if plain == text and len(plain) <= 63:
        return plain
    return f"{plain[:58].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
