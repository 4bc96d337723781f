"""What the processes of a run tell each other about host values; every process must call these at the same point."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def total(count: int) -> int:
    """The sum of every process's count."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def agreed(wish: bool, now: bool) -> bool:
    """Whether to do what any process wishes; several processes come together to ask only where `now` is set.

    A process alone does as it wishes at once.
    """
    if jax.process_count() == 1:
        return wish
    return now and total(int(wish)) > 0
