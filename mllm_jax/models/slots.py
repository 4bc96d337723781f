"""Image slots on every device of the mesh, whatever the devices share of the LLM.

Encoder and connector see each image by itself, so that images are the only thing worth splitting: a device takes whole
images, and the weights come to it block by block. Without this, devices that share a row would all encode its images.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from mllm_jax.models.heads import devices_over


def for_each_slot(
    encode: Callable[..., Shaped[Array, "n ..."]], *slots: Shaped[Array, "B I ..."]
) -> Shaped[Array, "B I ..."]:
    """`encode(*slots [n, ...]) -> [n, ...]` with the slots split like the logical axis "images".

    The slots of devices that share rows are filled up with zeros, as empty ones are, to a number that these devices
    divide.

    Args:
      slots: arrays of what stands in them.
    """
    rows = slots[0].shape[:2]
    groups, devices = devices_over("batch"), devices_over("images")
    if devices == groups or rows[0] % groups:
        found = encode(*(x.reshape(-1, *x.shape[2:]) for x in slots))
        return found.reshape(*rows, *found.shape[1:])
    count = rows[0] // groups * rows[1]
    size = count + -count % (devices // groups)

    def flat(x: Shaped[Array, "B I ..."]) -> Shaped[Array, "n ..."]:
        rest = x.shape[2:]
        x = jnp.pad(x.reshape(groups, count, *rest), [(0, 0), (0, size - count), *[(0, 0)] * len(rest)])
        return nn.with_logical_constraint(x.reshape(-1, *rest), ("batch", *[None] * len(rest)))

    rules = dict(nn.get_logical_axis_rules())
    with nn.logical_axis_rules((("batch", rules["images"]),)):  # nothing else is split
        found = encode(*map(flat, slots))
    found = found.reshape(groups, size, *found.shape[1:])
    found = nn.with_logical_constraint(found, ("batch", *[None] * (found.ndim - 1)))
    return found[:, :count].reshape(*rows, *found.shape[2:])
