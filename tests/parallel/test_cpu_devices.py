"""A CPU that is divided into devices, by configuration or by the environment."""

import subprocess
import sys

import pytest

from mllm_jax.parallel.cpu_devices import FLAG, THREADS, divide

MANY = "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"XLA_FLAGS": MANY}, f"{MANY} {FLAG}=false"),
        ({"XLA_FLAGS": f"--xla_dump_to=x {MANY}"}, f"--xla_dump_to=x {MANY} {FLAG}=false"),
        ({"JAX_NUM_CPU_DEVICES": "4"}, f"{FLAG}=false"),
        ({"JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": "--xla_dump_to=x"}, f"--xla_dump_to=x {FLAG}=false"),
        # left alone: one device, nothing asked for, the user's own choice
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
            "--xla_force_host_platform_device_count=1",
        ),
        ({"JAX_NUM_CPU_DEVICES": "1"}, None),
        ({}, None),
        ({"XLA_FLAGS": f"{MANY} {FLAG}=true"}, f"{MANY} {FLAG}=true"),
    ],
)
def test_the_scheduler_is_off_where_a_cpu_is_several_devices(before, after):
    divide(1, before)
    assert before.get("XLA_FLAGS") == after


def test_every_device_has_threads_to_spare():
    """With a thread per device, devices that wait for each other hold them all."""
    several = {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"}
    divide(1, several)
    assert int(several[THREADS]) >= 24
    own = {"JAX_NUM_CPU_DEVICES": "6", THREADS: "7"}
    divide(1, own)
    assert own[THREADS] == "7"
    alone = {}
    divide(1, alone)
    assert not alone


MADE = """import os, sys
from mllm_jax.parallel import cpu_devices
cpu_devices.divide(int(sys.argv[1]))
import jax
print(len(jax.devices()), os.environ.get("XLA_FLAGS"))
"""


@pytest.mark.parametrize(
    ("devices", "environment", "made"),
    [
        (1, {}, "1 None"),
        (3, {}, f"3 {FLAG}=false"),
        (3, {"JAX_NUM_CPU_DEVICES": "2"}, f"2 {FLAG}=false"),  # the user's own number
        (3, {"JAX_NUM_CPU_DEVICES": "1"}, "1 None"),
    ],
)
def test_a_cpu_is_divided_into_the_devices_of_the_configuration(
    devices, environment, made, script_environment, tmp_path
):
    script = tmp_path / "made.py"
    script.write_text(MADE)
    base = {key: value for key, value in script_environment.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, script, str(devices)],
        env={**base, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == made
