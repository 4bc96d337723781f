"""D-Abstractor: queries gather patches by deformable attention around learned reference points (Honeybee).

Source: khanrc/honeybee `honeybee/projectors/dabs.py`, `configs/model_config/d-abs.yaml`; its layers are
Deformable DETR's (`deformable`), with DETR's 8 heads, 4 points, inner width 1024 and dropout 0.1.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.deformable import STD, DeformableLayer
from mllm_jax.connectors.grids import check_table_grid, pool_grid, pooled_side
from mllm_jax.connectors.layers import append_tokens, dense, position_table


def reference_grid(side: int, grid: Grid) -> np.ndarray:
    """float32[side**2, 2]: (x, y) in 0..1 of a square of points from first to last patch centre."""
    y, x = (np.linspace(0.5, n - 0.5, side, dtype=np.float32) / np.float32(n) for n in grid)
    return np.stack([np.tile(x, side), np.repeat(y, side)], axis=-1)


class DAbstractor(Connector):
    """`depth` layers of deformable attention on M queries; Linear E -> D unless E = D.

    Patches first go through a Linear C -> E unless C = E, and get positions. A query has a content (what the
    layers update) and a position (added to queries and keys): by `pooled` the one, the other or neither is
    the patch grid pooled to sqrt(M) x sqrt(M), and what is not is learned.

    Honeybee's own initialisation overwrites Deformable DETR's for the sampling offsets: they start near zero,
    as here; `ring_offsets=True` starts them (and the point weights) as Deformable DETR does.

    Attributes:
      tokens: M, a perfect square (end tokens come on top).
      hidden: E.  depth: layers.  heads: attention heads.  points: sampled points per head.  mlp: inner width.
      dropout: rate on every residual branch.
      pooled: "query" (the position is pooled; Honeybee's setting), "target" (the content is), "none".
      position_table: learned positions added to the patches; ties the connector to one grid.
      ring_offsets: sampling offsets and point weights start as in Deformable DETR.
      end_tokens: learned tokens appended to the queries before the output projection.
    """

    tokens: int = 144
    hidden: int = 1024
    depth: int = 6
    heads: int = 8
    points: int = 4
    mlp: int = 1024
    dropout: float = option(0.1, least=0, below=1)
    pooled: str = option("query", choices=("query", "target", "none"))
    position_table: bool = True
    end_tokens: int = 0
    ring_offsets: bool = False

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        if self.hidden % self.heads:
            raise ValueError(
                f"d_abstractor.heads={self.heads} does not divide d_abstractor.hidden={self.hidden}"
            )
        pooled_side(self.tokens, grid, "d_abstractor.tokens")
        if self.position_table:
            check_table_grid(grid, self.vision.grid, "d_abstractor")
        return self.tokens + self.end_tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        side = pooled_side(self.tokens, features.grid, "d_abstractor.tokens")
        patches = self.selected(features).astype(self.dtype)
        if patches.shape[-1] != self.hidden:
            patches = dense(self, patches, self.hidden, "input", std=STD)
        if self.position_table:
            patches = patches + position_table(self, patches)

        learned_width = self.hidden if self.pooled != "none" else 2 * self.hidden
        init = nn.initializers.normal(STD)
        learned = self.param("queries", init, (self.tokens, learned_width), self.param_dtype)
        learned = jnp.broadcast_to(learned, (patches.shape[0], *learned.shape)).astype(self.dtype)
        if self.pooled == "none":
            positions, x = jnp.split(learned, 2, axis=-1)
        else:
            pooled = pool_grid(patches, features.grid, (side, side))
            positions, x = (pooled, learned) if self.pooled == "query" else (learned, pooled)

        start = reference_grid(side, self.vision.grid)
        references = self.param("references", lambda _: jnp.asarray(start, self.param_dtype))
        for i in range(self.depth):
            x = DeformableLayer(
                heads=self.heads,
                points=self.points,
                mlp=self.mlp,
                dropout=self.dropout,
                ring_offsets=self.ring_offsets,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"block_{i}",
            )(x, positions, patches, references, features.grid, deterministic)
        x = append_tokens(self, x, self.end_tokens, STD)
        return x if self.hidden == self.width else dense(self, x, self.width, "output", std=STD)
