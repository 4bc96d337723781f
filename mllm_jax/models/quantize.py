"""int8 storage of a frozen base: kernels as int8 with one float32 scale per output channel.

`Dense` multiplies by the int8 values in its computation dtype and scales the result, so a block's kernel is
widened only while that block runs. For LoRA on a base that would not fit otherwise.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax.models.paths import flatten, unflatten

SCALE = "_scale"  # ends the path of a quantised kernel's scale


def quantize(params: dict[str, Any], targets: str) -> dict[str, Any]:
    """Replaces kernels whose path matches `targets` by int8 `kernel` and `kernel_scale` [..., out].

    Symmetric, rounded to nearest: the error of a weight is at most half a step, max|column| / 254. Host arrays stay on
    the host.

    Raises:
      ValueError: the pattern matches no kernel.
    """
    flat = dict(flatten(params))
    paths = [path for path in flat if path.endswith("/kernel") and re.fullmatch(targets, path)]
    if not paths:
        raise ValueError(f"quantisation pattern {targets!r} matches no kernel")
    for path in paths:
        xp = np if isinstance(flat[path], np.ndarray) else jnp
        kernel = flat[path].astype(np.float32)
        scale = xp.maximum(xp.max(xp.abs(kernel), axis=-2), np.float32(1e-12)) / np.float32(127)
        flat[path] = xp.round(kernel / scale[..., None, :]).astype(np.int8)
        flat[f"{path}{SCALE}"] = scale
    return unflatten(flat)


def dequantize(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The weights that a quantised model computes with: kernels as `dtype` in place of int8 kernels and scales."""
    flat = flatten(params)
    scales = {
        path.removesuffix(SCALE): leaf for path, leaf in flat.items() if path.endswith(f"/kernel{SCALE}")
    }
    found = {path: leaf for path, leaf in flat.items() if path.removesuffix(SCALE) not in scales}
    for path, scale in scales.items():
        where = flat[path].sharding if isinstance(flat[path], jax.Array) else None
        found[path] = jax.jit(_widened, static_argnums=2, out_shardings=where)(
            flat[path], scale, jnp.dtype(dtype)
        )
    return unflatten(found)


def _widened(kernel: Any, scale: Any, dtype: Any) -> jax.Array:
    return (kernel.astype(jnp.float32) * scale[..., None, :]).astype(dtype)
