"""LLaVA-NeXT's spatial pooling: a strided window on the patch grid, before or after LLaVA's projector.

Sources: LLaVA-VL/LLaVA-NeXT `llava/model/multimodal_resampler/spatial_pool.py` (`mm_resampler_type="spatial_pool"`:
average, max or convolution before the projector) and `get_2dPool` in `llava/model/llava_arch.py` (average, max or
bilinear after it). Windows do not overlap; patches that fill no window are dropped, but bilinear interpolation covers
the whole grid and rounds its size up.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.grids import resize_grid
from mllm_jax.connectors.layers import project, uniform_within


class SpatialPool(Connector):
    """`stride` x `stride` patches become one token.

    Attributes:
      mode: "average", "max", "conv" (kernel and stride `stride`, with bias; before the projector only) or "bilinear"
        (half-pixel centres, no antialiasing).
      stride: patches per side of a window.
      position: "before" or "after" the projector.
      layers: of the projector `mlp{layers}x_gelu`.
    """

    mode: str = option("average", choices=("average", "max", "conv", "bilinear"))
    stride: int = 2
    position: str = option("before", choices=("before", "after"))
    layers: int = 2

    @nn.nowrap
    def output_grid(self, grid: Grid) -> Grid:
        """Rows and columns of the tokens.

        Raises:
          ValueError: the grid is smaller than a window, or a convolution would come after the projector.
        """
        if self.mode == "conv" and self.position == "after":
            raise ValueError(
                'spatial_pool.mode="conv" comes before the projector; set spatial_pool.position="before"'
            )
        if self.stride > min(grid):
            raise ValueError(
                f"spatial_pool.stride={self.stride} is more than the {grid[0]}x{grid[1]} patch grid"
            )
        up = self.stride - 1 if self.mode == "bilinear" else 0
        return ((grid[0] + up) // self.stride, (grid[1] + up) // self.stride)

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        return self.output_grid(grid)

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        rows, columns = self.output_grid(grid)
        return rows * columns

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        x = self.selected(features)
        if self.position == "after":
            return self._pool(project(self, x, self.layers), features.grid)
        return project(self, self._pool(x, features.grid), self.layers)

    def _pool(self, x: Float[Array, "B N C"], grid: Grid) -> Float[Array, "B M C"]:
        rows, columns = self.output_grid(grid)
        if self.mode == "bilinear":
            return resize_grid(x, grid, (rows, columns))
        batch, _, width = x.shape
        side = self.stride
        windows = x.reshape(batch, *grid, width)[:, : rows * side, : columns * side]
        windows = windows.reshape(batch, rows, side, columns, side, width)
        if self.mode == "max":
            return jnp.max(windows, axis=(2, 4)).reshape(batch, rows * columns, width)
        if self.mode == "average":
            mean = jnp.mean(windows.astype(jnp.float32), axis=(2, 4)).astype(x.dtype)
            return mean.reshape(batch, rows * columns, width)
        # A convolution whose stride equals its kernel is a dense layer on each window.
        windows = windows.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, side, side, width)
        return nn.DenseGeneral(
            width,
            axis=(-3, -2, -1),
            kernel_init=uniform_within((side * side * width) ** -0.5),
            bias_init=uniform_within((side * side * width) ** -0.5),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="conv",
        )(windows)
