"""The launch recipes: syntax, every configuration key in them, and what JAX makes of each launcher's variables."""

import os
import pathlib
import re
import subprocess

import jax
import pytest
import yaml

from mllm_jax.config import SCHEMA, ConfigError
from mllm_jax.parallel import launchers, processes
from mllm_jax.schema import Key, Named, find

ROOT = pathlib.Path(__file__).parents[1]
SHELL = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])
YAML = sorted((ROOT / "launch").glob("*.yaml"))
TEXTS = [*SHELL, *YAML, ROOT / "docs" / "launch.md"]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_key_is_one(path):
    keys = re.findall(r"--config\.([\w.]+)", path.read_text())
    assert keys or path.name.startswith("tpu_slice") or path.suffix == ".yaml"
    for key in keys:
        node = find(SCHEMA, key)
        assert isinstance(node, Key) or (isinstance(node, Named) and not key.endswith(".")), key


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_jobsets_have_one_process_per_pod(path):
    jobset = yaml.safe_load(path.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    if path.name == "jobset_gpu.yaml":
        assert int(environment[processes.COUNT]) == spec["completions"]
        host, port = environment[processes.ADDRESS].split(":")
        assert host == f"{jobset['metadata']['name']}-{job['name']}-0-0.{jobset['metadata']['name']}"
        assert {"containerPort": int(port)} in container["ports"]
        assert processes.INDEX in environment
        assert "--distributed" in container["args"]
        mesh = dict(re.findall(r"--config\.mesh\.(\w+)=(\d+)", " ".join(container["args"])))
        assert int(mesh["data"]) * int(mesh["fsdp"]) == 8 * spec["completions"]


def slurm(nodes, tasks, gpus, task=0):
    """What Slurm sets in a task of a step."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "node[003-006],other",
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus),
    }


def test_a_single_task_on_a_slurm_node_takes_all_gpus():
    assert launchers.local_devices(slurm(4, 1, 8)) == list(range(8))
    assert launchers.local_devices(slurm(4, 8, 8, task=9)) is None  # one each, which is JAX's own rule
    assert launchers.local_devices(slurm(4, 1, 8) | {"JAX_LOCAL_DEVICE_IDS": "0"}) is None
    assert launchers.local_devices(slurm(4, 1, 0)) is None  # CPUs
    assert launchers.local_devices({"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "8"}) is None  # no step
    assert launchers.local_devices({}) is None
    with pytest.raises(ConfigError, match=r"2 tasks on a node with 8 GPUs; start one task per GPU"):
        launchers.local_devices(slurm(4, 2, 8))


def joined(monkeypatch, environment):
    """What JAX would be told after its own detection, in a process with these variables."""
    from jax._src import clusters

    launched = re.compile("SLURM_|JAX_COORDINATOR|JAX_NUM_PROC|JAX_PROCESS|KUBERNETES|OMPI_|TPU_|MEGASCALE")
    for name in filter(launched.match, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = []

    def initialize(num_processes, process_id, local_device_ids=None, **_):
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        told.append(
            clusters.ClusterEnv.auto_detect_unset_distributed_params(
                address, num_processes, process_id, local_device_ids, None, 1
            )
        )

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.join()
    return told[0]


def test_what_jax_makes_of_slurm(monkeypatch):
    address, count, index, devices = joined(monkeypatch, slurm(4, 1, 8, task=2))
    assert (address.split(":")[0], count, index, devices) == ("node003", 4, 2, list(range(8)))
    _, count, index, devices = joined(monkeypatch, slurm(4, 8, 8, task=9))
    assert (count, index, devices) == (32, 9, [1])


def test_what_jax_makes_of_a_jobset(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", False)  # as with libtpu, for planning
    address = "llava15-workers-0-0.llava15:8476"
    environment = {processes.ADDRESS: address, processes.COUNT: "4", processes.INDEX: "3"}
    assert joined(monkeypatch, environment) == (address, 4, 3, None)


def test_what_jax_makes_of_gke(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.GkeTpuCluster, "wait_for_coordinator", lambda *_: None)
    environment = {
        "TPU_SKIP_MDS_QUERY": "true",  # or else JAX asks Google's metadata first
        "TPU_WORKER_HOSTNAMES": "a,b,c,d",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "a:8080",
    }
    address, count, index, devices = joined(monkeypatch, environment)
    assert (address.split(":")[0], count, index, devices) == ("a", 8, 5, None)


@pytest.mark.parametrize(
    ("state", "broken", "code", "said"),
    [
        ("ACTIVE", "none", 0, ""),
        ("ACTIVE", "llava-0", 3, ""),
        ("FAILED", "none", 1, "queued resource llava is FAILED"),
    ],
)
def test_slices_that_fail_end_the_script(tmp_path, state, broken, code, said):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
*describe*) echo {state} ;;
*"ssh {broken} "*) exit 3 ;;
esac
"""
    )
    gcloud.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "REPOSITORY": "https://example.org/x",
    }
    command = ["bash", ROOT / "launch" / "tpu_multislice.sh", "llava", "gs://b", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == code
    assert said in done.stderr
