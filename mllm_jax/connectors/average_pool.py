"""Average pooling: the patch grid is averaged over local windows, then projected by an MLP (P1 2.4).

P1 writes the windows as one-dimensional runs and draws them as squares; two-dimensional adaptive pooling (as
in DeCo) is the default, `mode="1d"` pools the flattened row-major sequence.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.grids import pool_grid, pooled_side
from mllm_jax.connectors.layers import project


class AveragePool(Connector):
    """Adaptive average pooling to `tokens` tokens before `mlp{layers}x_gelu`.

    Attributes:
      tokens: M; a perfect square in 2-D mode.
      mode: "2d" (windows on the patch grid) or "1d" (runs of the flattened sequence).
      layers: layers of the MLP.
    """

    tokens: int = 144
    mode: str = option("2d", choices=("1d", "2d"))
    layers: int = 2

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        if self.mode != "2d":
            return None
        side = pooled_side(self.tokens, grid, "average_pool.tokens")
        return side, side

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        if self.mode == "2d":
            pooled_side(self.tokens, grid, "average_pool.tokens")
        elif not 1 <= self.tokens <= grid[0] * grid[1]:
            raise ValueError(
                f"average_pool.tokens={self.tokens} cannot be pooled from {grid[0] * grid[1]} patches"
            )
        return self.tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        x = self.selected(features)
        if self.mode == "1d":
            x = pool_grid(x, (1, x.shape[1]), (1, self.tokens))
        else:
            side = pooled_side(self.tokens, features.grid, "average_pool.tokens")
            x = pool_grid(x, features.grid, (side, side))
        return project(self, x, self.layers)
