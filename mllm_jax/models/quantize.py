"""int8 storage of a frozen base: kernels as int8 with one float32 scale per output channel.

`Dense` multiplies by the int8 values in its computation dtype and scales the result, so a block's kernel is
widened only while that block runs. For LoRA on a base that would not fit otherwise.
"""

import re
from typing import Any

import jax.numpy as jnp

from mllm_jax.models.paths import flatten, unflatten


def quantize(params: dict[str, Any], targets: str) -> dict[str, Any]:
    """Replaces kernels whose path matches `targets` by int8 `kernel` and `kernel_scale` [..., out].

    Symmetric, rounded to nearest: the error of a weight is at most half a step, max|column| / 254.

    Raises:
      ValueError: the pattern matches no kernel.
    """
    flat = dict(flatten(params))
    paths = [path for path in flat if path.endswith("/kernel") and re.fullmatch(targets, path)]
    if not paths:
        raise ValueError(f"quantisation pattern {targets!r} matches no kernel")
    for path in paths:
        kernel = jnp.asarray(flat[path], jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-2), 1e-12) / 127
        flat[path] = jnp.round(kernel / scale[..., None, :]).astype(jnp.int8)
        flat[f"{path}_scale"] = scale
    return unflatten(flat)
