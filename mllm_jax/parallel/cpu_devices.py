"""One CPU as several devices: to train faster on its cores, or to try a mesh where there is none."""

import os
import re
from collections.abc import MutableMapping

import jax

FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"
THREADS = "PJRT_NPROC"  # size of the pool whose threads run the devices and their parts


def divide(devices: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes JAX see this CPU as several devices, and lets them run; comes before anything that touches a device.

    A device whose rows are its own does most of a step without waiting for other threads, where a single device
    spreads each operation over all cores and waits for the slowest. Other platforms keep their devices.

    Args:
      devices: how many (config key `mesh.cpu_devices`); 1 leaves the CPU whole.
      environment: where `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES` may ask for a number, which then holds instead.
    """
    asked = _asked(environment)
    if asked is None and devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    _order_collectives(devices if asked is None else asked, environment)


def _asked(environment: MutableMapping[str, str]) -> int | None:
    """The number of CPU devices that the environment asks for; None if it does not."""
    found = re.findall(r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", ""))
    found.append(environment.get("JAX_NUM_CPU_DEVICES", ""))
    return max((int(count) for count in found if count.isdecimal()), default=None)


def _order_collectives(devices: int, environment: MutableMapping[str, str]) -> None:
    """Keeps CPU devices from waiting for each other forever.

    XLA's CPU scheduler may start independent collectives in another order on each device. With fewer cores than
    devices, one device then waits in an all-gather and another in an all-to-all until XLA aborts the program, so this
    scheduler is switched off. The thread pool has a thread per core or device; where each is held by a device that
    waits, nobody computes what it waits for (seen with jax 0.12, 4 devices on 2 cores), so it gets more of them. A
    setting of the user's own is left alone.
    """
    flags = environment.get("XLA_FLAGS", "")
    if devices > 1:
        environment.setdefault(THREADS, str(max(4 * devices, os.cpu_count() or 1)))
        if FLAG not in flags:
            environment["XLA_FLAGS"] = f"{flags} {FLAG}=false".strip()
