"""Row-major token grids: adaptive pooling and bilinear resizing as small matrices, exact on any backend."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Grid


def averaging_matrix(length: int, out: int) -> np.ndarray:
    """float32[out, length] of 1-D adaptive average pooling.

    Row k is the mean over [floor(k * length / out), ceil((k + 1) * length / out)).
    """
    matrix = np.zeros((out, length), np.float32)
    for k in range(out):
        start, end = k * length // out, -(-(k + 1) * length // out)
        matrix[k, start:end] = 1 / (end - start)
    return matrix


def bilinear_matrix(length: int, out: int) -> np.ndarray:
    """float32[out, length] of 1-D linear interpolation.

    Half-pixel centres, no antialiasing, border samples repeated: as torch's
    `interpolate(mode="bilinear", align_corners=False)`. Halving is the mean of neighbours.
    """
    matrix = np.zeros((out, length), np.float64)
    for k in range(out):
        centre = max((k + 0.5) * length / out - 0.5, 0.0)
        left = min(int(centre), length - 1)
        matrix[k, left] += 1 - (centre - left)
        matrix[k, min(left + 1, length - 1)] += centre - left
    return matrix.astype(np.float32)


def _apply(
    x: Float[Array, "B N C"], grid: Grid, rows: np.ndarray, columns: np.ndarray
) -> Float[Array, "B M C"]:
    x32 = x.astype(jnp.float32).reshape(x.shape[0], *grid, x.shape[-1])
    out = jnp.einsum("bhwc,yh,xw->byxc", x32, rows, columns, precision="highest")
    return out.reshape(x.shape[0], -1, x.shape[-1]).astype(x.dtype)


def pool_grid(x: Float[Array, "B N C"], grid: Grid, out: Grid) -> Float[Array, "B M C"]:
    """2-D adaptive average pooling of row-major tokens from `grid` to `out`, in float32.

    Examples:
      >>> pool_grid(jnp.arange(4.0).reshape(1, 4, 1), grid=(2, 2), out=(2, 1)).ravel().tolist()
      [0.5, 2.5]
    """
    return _apply(x, grid, averaging_matrix(grid[0], out[0]), averaging_matrix(grid[1], out[1]))


def resize_grid(x: Float[Array, "B N C"], grid: Grid, out: Grid) -> Float[Array, "B M C"]:
    """Bilinear interpolation of row-major tokens from `grid` to `out`, in float32.

    Examples:
      >>> resize_grid(jnp.arange(4.0).reshape(1, 4, 1), grid=(2, 2), out=(1, 4)).ravel().tolist()
      [1.0, 1.25, 1.75, 2.0]
    """
    return _apply(x, grid, bilinear_matrix(grid[0], out[0]), bilinear_matrix(grid[1], out[1]))


def joined_maps(maps: Sequence[Float[Array, "B _ _ _"]], grid: Grid) -> Float[Array, "B y x A"]:
    """Maps side by side on the channel axis, those of other resolutions brought to `grid`."""
    flat = [(x.reshape(x.shape[0], -1, x.shape[-1]), x.shape[1:3]) for x in maps]
    resized = [x if own == grid else resize_grid(x, own, grid) for x, own in flat]
    return jnp.concatenate(resized, axis=-1).reshape(maps[0].shape[0], *grid, -1)


def square_side(tokens: int, option: str) -> int:
    """The side of a square of `tokens` tokens.

    Raises:
      ValueError: `tokens` is not a perfect square; the message names `option`.

    Examples:
      >>> square_side(144, "tokens")
      12
    """
    side = math.isqrt(max(tokens, 0))
    if side < 1 or side * side != tokens:
        below, above = max(side, 1) ** 2, (side + 1) ** 2
        raise ValueError(f"{option}={tokens} is not a perfect square; the nearest are {below} and {above}")
    return side


def pooled_side(tokens: int, grid: Grid, option: str) -> int:
    """The side of the square that `grid` is pooled to.

    Raises:
      ValueError: not a square, or larger than the grid.

    Examples:
      >>> pooled_side(36, (12, 12), "tokens")
      6
    """
    side = square_side(tokens, option)
    if side > min(grid):
        raise ValueError(f"{option}={tokens} cannot be pooled from a {grid[0]}x{grid[1]} patch grid")
    return side


def divided(grid: Grid, factor: int, option: str) -> Grid:
    """The grid with `factor` x `factor` patches taken together.

    Raises:
      ValueError: `factor` does not divide both sides; the message names `option`.

    Examples:
      >>> divided((24, 24), 3, "side")
      (8, 8)
      >>> divided((27, 20), 3, "side")
      Traceback (most recent call last):
        ...
      ValueError: side=3 does not divide the 27x20 patch grid
    """
    if factor < 1 or grid[0] % factor or grid[1] % factor:
        raise ValueError(f"{option}={factor} does not divide the {grid[0]}x{grid[1]} patch grid")
    return (grid[0] // factor, grid[1] // factor)


def check_table_grid(grid: Grid, table_grid: Grid, connector: str) -> None:
    """Checks that a learned position table is made for this grid.

    Raises:
      ValueError: it is not.
    """
    if grid != table_grid:
        raise ValueError(
            f"{connector}: the position table is made for a {table_grid[0]}x{table_grid[1]} patch "
            f"grid and does not fit {grid[0]}x{grid[1]}; use the model's image size or "
            f"{connector}.position_table=False"
        )
