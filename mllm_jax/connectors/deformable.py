"""Deformable attention over one patch grid and the decoder layer around it (Deformable DETR).

Written from transformers `models/deformable_detr/modeling_deformable_detr.py`, for one feature level and no
padding.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Grid
from mllm_jax.connectors.layers import attend, dense, keep_attention, layer_norm

STD = 0.02


def sampling_map(
    points: Float[Array, "B M H P 2"], weights: Float[Array, "B M H P"], grid: Grid
) -> Float[Array, "B H M N"]:
    """What sampling the patch grid at `points` and summing with `weights` takes from each patch.

    Bilinear with half-pixel centres and zeros outside (torch's `grid_sample`, align_corners=False). The
    bilinear kernel is the product of a hat over rows and a hat over columns, so no gather is needed.

    Args:
      points: (x, y) in patches, float32; (0, 0) is the center of the first patch.
      weights: of the P points, float32.
    """
    rows, columns = (
        jnp.maximum(0.0, 1.0 - jnp.abs(points[..., axis, None] - jnp.arange(n)))
        for axis, n in ((1, grid[0]), (0, grid[1]))
    )
    out = jnp.einsum("bmkpy,bmkpx->bkmyx", rows * weights[..., None], columns, precision="highest")
    return out.reshape(*out.shape[:3], -1)


def ring(heads: int, points: int) -> np.ndarray:
    """Deformable DETR's initial offsets (x, y): head k at angle 2 pi k / heads, point p at p + 1."""
    angle = np.arange(heads) * (2 * math.pi / heads)
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    return (direction[:, None] * np.arange(1, points + 1)[:, None]).astype(np.float32)


class DeformableLayer(nn.Module):
    """Self-attention over queries, deformable attention to patches, ReLU MLP; add and LayerNorm after each.

    Positions are added to queries and keys of the self-attention and to the queries of the deformable
    attention.
    """

    heads: int
    points: int
    mlp: int
    dropout: float
    ring_offsets: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B M E"],
        positions: Float[Array, "B M E"],
        patches: Float[Array, "B N E"],
        references: Float[Array, "M 2"],
        grid: Grid,
        deterministic: bool,
    ) -> Float[Array, "B M E"]:
        def add(x: Array, y: Array, name: str) -> Array:
            return layer_norm(self, x + nn.Dropout(self.dropout)(y, deterministic=deterministic), name)

        width = x.shape[-1]
        q, k = (dense(self, x + positions, width, f"self_{n}", std=STD) for n in ("q", "k"))
        v = dense(self, x, width, "self_v", std=STD)
        x = add(x, dense(self, attend(q, k, v, self.heads), width, "self_out", std=STD), "self_norm")
        x = add(x, self._deformable(x + positions, patches, references, grid), "cross_norm")
        y = dense(self, jax.nn.relu(dense(self, x, self.mlp, "fc1", std=STD)), width, "fc2", std=STD)
        return add(x, y, "mlp_norm")

    def _deformable(self, queries: Array, patches: Array, references: Array, grid: Grid) -> Array:
        batch, count, width = queries.shape
        shape = (batch, count, self.heads, self.points)
        std = 0.0 if self.ring_offsets else STD
        offset_init = {"bias_init": self._ring_bias} if self.ring_offsets else {}
        offsets = dense(self, queries, self.heads * self.points * 2, "offsets", std=std, **offset_init)
        weights = dense(self, queries, self.heads * self.points, "weights", std=std).reshape(shape)
        weights = jax.nn.softmax(weights.astype(jnp.float32), axis=-1)
        values = dense(self, patches, width, "value", std=STD)
        values = values.reshape(batch, -1, self.heads, width // self.heads)
        # References are in 0..1 over the image, offsets in patches.
        points = references.astype(jnp.float32) * jnp.asarray((grid[1], grid[0]), jnp.float32) - 0.5
        points = points[None, :, None, None] + offsets.astype(jnp.float32).reshape(*shape, 2)
        taken = sampling_map(points, weights, grid)
        keep_attention(self, taken)
        taken = taken.astype(self.dtype)
        gathered = jnp.einsum("bkmn,bnkd->bmkd", taken, values).reshape(batch, count, width)
        return dense(self, gathered, width, "out", std=STD)

    def _ring_bias(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.asarray(ring(self.heads, self.points).reshape(shape), dtype)
