"""Average pooling connector: the patch grid is averaged over local windows, then projected by an MLP (P1 2.4).

P1 writes the windows as one-dimensional runs and draws them as squares; two-dimensional adaptive pooling (as in
DeCo) is the default, `mode="1d"` pools the flattened row-major sequence.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, project


def averaging_matrix(length: int, out: int) -> np.ndarray:
    """Adaptive average pooling as a matrix: float32[out, length], row k averages [floor(k*length/out), ceil((k+1)*length/out))."""
    matrix = np.zeros((out, length), np.float32)
    for k in range(out):
        start, end = k * length // out, -(-(k + 1) * length // out)
        matrix[k, start:end] = 1 / (end - start)
    return matrix


def square_side(tokens: int, option: str) -> int:
    """The side of a square of `tokens` tokens.

    Raises:
      ValueError: `tokens` is not a perfect square; the message names `option`.
    """
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        below, above = max(side, 1) ** 2, (side + 1) ** 2
        raise ValueError(f"{option}={tokens} is not a perfect square; the nearest are {below} and {above}")
    return side


def pool_grid(x: Float[Array, "B N C"], grid: Grid, out: Grid) -> Float[Array, "B M C"]:
    """2-D adaptive average pooling of row-major tokens from `grid` to `out`, computed in float32."""
    rows, columns = averaging_matrix(grid[0], out[0]), averaging_matrix(grid[1], out[1])
    x32 = x.astype(jnp.float32).reshape(x.shape[0], *grid, x.shape[-1])
    pooled = jnp.einsum("bhwc,yh,xw->byxc", x32, rows, columns, precision="highest")
    return pooled.reshape(x.shape[0], out[0] * out[1], x.shape[-1]).astype(x.dtype)


class AveragePool(Connector):
    """Adaptive average pooling to `tokens` tokens before `mlp{layers}x_gelu`.

    Attributes:
      tokens: M; a perfect square in 2-D mode.
      mode: "2d" (windows on the patch grid) or "1d" (runs of the flattened sequence).
      layers: layers of the MLP.
    """

    tokens: int = 144
    mode: str = "2d"
    layers: int = 2

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        if self.mode not in ("1d", "2d"):
            raise ValueError(f'average_pool.mode={self.mode!r}; valid: "1d", "2d"')
        smallest, available = (1, grid[0] * grid[1])
        if self.mode == "2d":
            smallest, available = square_side(self.tokens, "average_pool.tokens"), min(grid)
        if not 1 <= smallest <= available or self.tokens > grid[0] * grid[1]:
            raise ValueError(f"average_pool.tokens={self.tokens} cannot be pooled from a {grid[0]}x{grid[1]} patch grid")
        return self.tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        x = self.selected(features)
        if self.mode == "1d":
            x = pool_grid(x, (1, x.shape[1]), (1, self.tokens))
        else:
            side = square_side(self.tokens, "average_pool.tokens")
            x = pool_grid(x, features.grid, (side, side))
        return project(self, x, self.layers)
