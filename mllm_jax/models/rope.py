"""Rotary position embedding in the half-split layout of Hugging Face, with context extensions."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCALINGS = ("linear", "llama3", "yarn")


def frequencies(theta: int | float, width: int, scaling: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Angle per position of each channel pair, and the factor on cos and sin.

    Args:
      theta: base of the geometric series theta^(-2j/width).
      width: rotated channels, even.
      scaling: {} or a checkpoint's rope parameters with "rope_type": "linear" (all angles / factor), "llama3"
        (only wavelengths beyond the original context are divided by factor, with a smooth transition;
        Llama 3.1) or "yarn" (divided below beta_slow rotations per context, kept above beta_fast;
        arXiv 2309.00071).

    Returns:
      float32[width / 2] and the factor (1 except for yarn).

    Raises:
      ValueError: another rope_type.
    """
    series = (np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(
        np.float32
    )
    plain = (1 / series).astype(np.float32)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return plain, 1.0
    if kind not in SCALINGS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: default, {', '.join(SCALINGS)}")
    factor = scaling["factor"]
    if kind == "linear":
        return plain / np.float32(factor), 1.0
    context = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rotations = context * plain / (2 * math.pi)  # within the original context
        smooth = np.clip((rotations - low) / (high - low), 0, 1)
        return ((1 - smooth) * plain / factor + smooth * plain).astype(np.float32), 1.0

    def channel_of(rotations: int | float) -> float:
        return width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_of(scaling.get("beta_fast") or 32), channel_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = np.clip((np.arange(width // 2) - low) / (max(high - low, 1e-3)), 0, 1)
    scaled = plain / factor * ramp + plain * (1 - ramp)
    return scaled.astype(np.float32), _yarn_magnitude(scaling, factor)


def _yarn_magnitude(scaling: Mapping[str, Any], factor: int | float) -> float:
    def magnitude(weight: int | float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def rotary(
    x: Float[Array, "B T H h"],
    positions: Int[Array, "B T"],
    per_position: Float[np.ndarray, " half"],
    magnitude: float = 1.0,
) -> Float[Array, "B T H h"]:
    """Rotates the first 2 * half channels of every head, pairing j with j + half; angles in float32."""
    half = len(per_position)
    angles = positions[..., None].astype(jnp.float32) * per_position
    cos, sin = magnitude * jnp.cos(angles)[:, :, None], magnitude * jnp.sin(angles)[:, :, None]
    first, second = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    rotated = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.concatenate(rotated, axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
