"""Several devices on one CPU, to try a mesh where there is none."""

import os
import re
from collections.abc import MutableMapping

FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"


def order_collectives(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps fake CPU devices from waiting for each other forever; comes before anything that touches a device.

    XLA's CPU scheduler may start independent collectives in another order on each device. With fewer cores than
    devices, one device then waits in an all-gather and another in an all-to-all until XLA aborts the program. Only
    the scheduler is switched off: results stay the same. A setting of the user's own is left alone.

    Args:
      environment: where `XLA_FLAGS` or `JAX_NUM_CPU_DEVICES` ask for several devices.
    """
    flags = environment.get("XLA_FLAGS", "")
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    asked.append(environment.get("JAX_NUM_CPU_DEVICES", ""))
    if any(count.isdecimal() and int(count) > 1 for count in asked) and FLAG not in flags:
        environment["XLA_FLAGS"] = f"{flags} {FLAG}=false".strip()
