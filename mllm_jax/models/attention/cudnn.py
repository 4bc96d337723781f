"""cuDNN's fused attention, through JAX: NVIDIA GPUs, in half precision.

`jax.nn.dot_product_attention` knows no segments, so they reach the kernel as a boolean [B, 1, T, S] mask, which cuDNN
adds to its logits; causal parts are skipped besides. Nothing of size [B, H, T, S] exists.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.models.attention.devices import per_device
from mllm_jax.models.attention.mask import AttentionMask
from mllm_jax.models.attention.use import Use

# Widest heads, and compute capabilities (their first number): Ampere has fused attention, Hopper has it for wide heads.
WIDEST, WIDEST_BEFORE_HOPPER = 256, 128
OLDEST, HOPPER = 8, 9
PACKAGES = ("jax", "jaxlib", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def refusal(use: Use) -> str | None:
    """Why cuDNN cannot compute this here, if it cannot. Away from a GPU (a plan), the device's part is left out."""
    if use.dtype not in ("bfloat16", "float16"):
        return f"cuDNN computes in bfloat16 or float16, not {use.dtype} (model.dtype)"
    if use.softcap is not None:
        return f"cuDNN has no soft cap of logits, and this model has one of {use.softcap:g}"
    if use.head_width % 8 or use.head_width > WIDEST:
        return f"cuDNN needs heads of a multiple of 8 up to {WIDEST} wide, and these are {use.head_width}"
    device = jax.devices()[0]
    return _device_refusal(device, use.head_width) if device.platform == "gpu" else None


def _device_refusal(device: Any, head_width: int) -> str | None:
    if "cuda" not in device.client.platform_version:  # JAX calls AMD's GPUs "gpu", too
        return f"cuDNN is for NVIDIA GPUs, and this is {device.device_kind}"
    capability = device.compute_capability
    generation = int(capability.split(".")[0])
    if generation < OLDEST:
        return f"cuDNN needs compute capability {OLDEST}.0 or later, and this {device.device_kind} has {capability}"
    if generation < HOPPER and head_width > WIDEST_BEFORE_HOPPER:
        return (
            f"cuDNN needs heads of at most {WIDEST_BEFORE_HOPPER} before compute capability {HOPPER}.0, and these are "
            f"{head_width} on a {device.device_kind} of {capability}"
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
    batch, length = q.shape[:2]
    odd = [(0, 0), (0, length % 2)]  # cuDNN takes even lengths only; a tower's padding needs a mask, too
    if mask is None and not length % 2:
        return per_device(lambda q, k, v: _fused(q, k, v, None, False, scale), q, k, v)
    if mask is None:
        ones = jnp.ones((batch, length), jnp.int32)
        mask = AttentionMask(ones, ones, causal=False)
    mask = mask.replace(q_segments=jnp.pad(mask.q_segments, odd), kv_segments=jnp.pad(mask.kv_segments, odd))
    q, k, v = (jnp.pad(x, [*odd, (0, 0), (0, 0)]) for x in (q, k, v))

    def kernel(q, k, v, segments):
        own = mask.replace(q_segments=segments, kv_segments=segments)
        return _fused(q, k, v, own.dense()[:, None], mask.causal, scale)

    return per_device(kernel, q, k, v, mask.q_segments)[:, :length]


def _fused(q: Array, k: Array, v: Array, allowed: Array | None, causal: bool, scale: float) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=allowed, is_causal=causal, scale=scale, implementation="cudnn"
    )
