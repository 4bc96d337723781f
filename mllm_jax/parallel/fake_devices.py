"""Several devices on one CPU, to try a mesh where there is none."""

import os
import re
from collections.abc import MutableMapping

FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"
THREADS = "PJRT_NPROC"  # size of the pool whose threads run the devices and their parts


def order_collectives(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps fake CPU devices from waiting for each other forever; comes before anything that touches a device.

    XLA's CPU scheduler may start independent collectives in another order on each device. With fewer cores than
    devices, one device then waits in an all-gather and another in an all-to-all until XLA aborts the program, so this
    scheduler is switched off. The thread pool has a thread per core or device; where each is held by a device that
    waits, nobody computes what it waits for (seen with jax 0.12, 4 devices on 2 cores), so it gets more of them. A
    setting of the user's own is left alone.

    Args:
      environment: where `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES` ask for several devices.
    """
    flags = environment.get("XLA_FLAGS", "")
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    asked.append(environment.get("JAX_NUM_CPU_DEVICES", ""))
    devices = max((int(count) for count in asked if count.isdecimal()), default=1)
    if devices > 1:
        environment.setdefault(THREADS, str(max(4 * devices, os.cpu_count() or 1)))
        if FLAG not in flags:
            environment["XLA_FLAGS"] = f"{flags} {FLAG}=false".strip()
