"""tokamax's flash attention in Pallas: NVIDIA GPUs from Hopper on, in half precision; an optional package.

Its public `dot_product_attention` takes no segments. The kernel's own mask has a first and a last key of every query,
which is what segments and windows are here. That mask is not public, so the versions that were read are listed.
"""

import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.models.attention.devices import per_device
from mllm_jax.models.attention.mask import AttentionMask
from mllm_jax.models.attention.use import Use

PACKAGES = ("jax", "jaxlib", "tokamax")
VERSIONS = ("0.0.17",)
CAPABILITIES = ("9.0", "10.0")  # of those with a backward pass


def refusal(use: Use) -> str | None:
    """Why tokamax cannot compute this here, if it cannot."""
    try:
        version = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return "the package tokamax is not installed (pip install 'mllm-jax[tokamax]', Python 3.12 or later)"
    if version not in VERSIONS:
        return f"tokamax {version} is installed, and its mask by first and last key is known of {', '.join(VERSIONS)}"
    if use.dtype not in ("bfloat16", "float16"):
        return f"tokamax computes in bfloat16 or float16, not {use.dtype} (model.dtype)"
    found = getattr(jax.devices()[0], "compute_capability", None)
    if found is not None and found not in CAPABILITIES:
        return (
            f"tokamax has a backward pass for compute capabilities {', '.join(CAPABILITIES)}; this is {found}"
        )
    return None


def attend(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: AttentionMask | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H h"]:
    """`mllm_jax.models.attention.attend` with every argument given and T = S; `refusal` says what is not possible."""
    from tokamax.ops.gpu import PallasMosaicFlashAttention

    run = PallasMosaicFlashAttention()
    options = {"logits_scale": scale, "logits_soft_cap": softcap}
    if mask is None:
        return per_device(lambda q, k, v: run(q, k, v, **options), q, k, v)
    first, last = mask.key_ranges()
    last = jnp.maximum(first, last)  # every query needs a key, padding too

    def kernel(q, k, v, first, last):
        return run(q, k, v, mask=_mask(first, last, mask.causal), **options)

    return per_device(kernel, q, k, v, first, last)


def _mask(first: Array, last: Array, causal: bool) -> Any:
    """tokamax's mask of these key ranges; it skips more where it knows that a mask is causal."""
    from tokamax._src.ops.attention.base import Mask

    if causal:
        return Mask(k_start=first[:, None], is_causal=True)
    return Mask(k_start=first[:, None], k_end=last[:, None] + 1)
