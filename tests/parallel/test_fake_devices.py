import pytest

from mllm_jax.parallel.fake_devices import FLAG, THREADS, order_collectives

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
def test_the_scheduler_is_off_where_devices_are_fake(before, after):
    order_collectives(before)
    assert before.get("XLA_FLAGS") == after


def test_every_fake_device_has_threads_to_spare():
    """With a thread per device, devices that wait for each other hold them all."""
    several = {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"}
    order_collectives(several)
    assert int(several[THREADS]) >= 24
    own = {"JAX_NUM_CPU_DEVICES": "6", THREADS: "7"}
    order_collectives(own)
    assert own[THREADS] == "7"
    alone = {}
    order_collectives(alone)
    assert not alone
