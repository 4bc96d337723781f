"""Pixel shuffle (space to depth): r x r patches become one token of r*r*C channels, then a projection.

Channels of a token are ordered by patch row, patch column, channel. Sources: OpenGVLab/InternVL
`internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py` (`ps_version` v2) and transformers
`models/idefics3/modeling_idefics3.py`; both have this order.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.grids import divided
from mllm_jax.connectors.layers import dense, layer_norm, project


def space_to_depth(x: Float[Array, "B N C"], grid: Grid, factor: int) -> Float[Array, "B M F"]:
    """Takes `factor` x `factor` patches together; [B, N, C] to [B, N / factor**2, C * factor**2].

    Raises:
      ValueError: the factor does not divide the grid.
    """
    rows, columns = divided(grid, factor, "pixel_shuffle.factor")
    batch, _, width = x.shape
    x = x.reshape(batch, rows, factor, columns, factor, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, factor * factor * width)


class PixelShuffle(Connector):
    """Space to depth, then the family's projection.

    Variant "internvl": LayerNorm(r*r*C), Linear -> D, exact GELU, Linear D -> D.
    Variant "idefics3": one Linear without bias.

    Attributes:
      variant: "internvl" or "idefics3", as above.
      factor: r, patches per side of a token; must divide the grid.
    """

    factor: int = 2
    variant: str = option("internvl", choices=("internvl", "idefics3"))

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        return divided(grid, self.factor, "pixel_shuffle.factor")

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        rows, columns = divided(grid, self.factor, "pixel_shuffle.factor")
        return rows * columns

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        x = space_to_depth(self.selected(features), features.grid, self.factor)
        if self.variant == "idefics3":
            return dense(self, x, self.width, "layer_0", use_bias=False)
        return project(self, layer_norm(self, x, "norm"))
