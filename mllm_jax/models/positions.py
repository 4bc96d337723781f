"""Resizing a learned position table to another patch grid, as torch's `interpolate` does."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]

METHODS = ("bicubic", "bilinear", "bicubic_antialias", "bilinear_antialias")


def _cubic(distance: float, a: float) -> float:
    """Cubic convolution kernel (Keys 1981) at |distance|."""
    d = abs(distance)
    if d < 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def interpolation_matrix(length: int, out: int, method: str) -> np.ndarray:
    """float32[out, length]: 1-D resize with half-pixel centres.

    Plain methods repeat the border samples and use a = -0.75 for bicubic. The antialiased ones widen the
    kernel when shrinking, renormalise at the border and use a = -0.5.

    Raises:
      ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"interpolation={method!r}; valid: {', '.join(METHODS)}")
    matrix = np.zeros((out, length), np.float64)
    scale = length / out
    for row in range(out):
        centre = (row + 0.5) * scale - 0.5
        if method.endswith("_antialias"):
            width = max(scale, 1.0)
            reach = width * (2 if method.startswith("bicubic") else 1)
            first = max(int(centre + 0.5 - reach + 0.5), 0)
            last = min(int(centre + 0.5 + reach + 0.5), length)
            distances = (np.arange(first, last) - centre) / width
            if method.startswith("bicubic"):
                weights = np.array([_cubic(d, -0.5) for d in distances])
            else:
                weights = np.maximum(1 - np.abs(distances), 0)
            matrix[row, first:last] = weights / weights.sum()
            continue
        if method == "bilinear":
            centre = max(centre, 0.0)
        base = int(np.floor(centre))
        for place in range(base - 1, base + 3):
            d = place - centre
            weight = _cubic(d, -0.75) if method == "bicubic" else max(1 - abs(d), 0.0)
            matrix[row, min(max(place, 0), length - 1)] += weight
    return matrix.astype(np.float32)


def resize_position_table(
    table: Float[Array, "N C"], old: Grid, new: Grid, method: str
) -> Float[Array, "M C"]:
    """Resizes the patch part of a position table from grid `old` to grid `new` (float32)."""
    if old == new:
        return table
    rows = interpolation_matrix(old[0], new[0], method)
    columns = interpolation_matrix(old[1], new[1], method)
    grid = table.astype(jnp.float32).reshape(*old, -1)
    out = jnp.einsum("hwc,yh,xw->yxc", grid, rows, columns, precision="highest")
    return out.reshape(new[0] * new[1], -1)


def positions_of_grids(
    table: Float[Array, "N C"], old: Grid, grids: Int[Array, "B 2"], length: int
) -> Float[Array, "B L C"]:
    """The patch part of a position table resized to each image's own grid, bilinearly with antialiasing (float32).

    Every position is the table's, weighted along rows and columns; behind an image's last patch it is its first one's.

    Args:
      old: the table's grid.
      grids: rows and columns of each image; 0 for none.
      length: L, positions of every image.
    """
    sizes = jnp.maximum(grids, 1)[:, None]
    index = jnp.arange(length)[None]
    places = jnp.stack([index // sizes[..., 1], index % sizes[..., 1]], axis=-1)
    places = jnp.where(index[..., None] < jnp.prod(sizes, axis=-1, keepdims=True), places, 0)

    def weights(axis: int) -> Float[Array, "B L n"]:
        scale = old[axis] / sizes[..., axis, None].astype(jnp.float32)
        centre = (places[..., axis, None] + 0.5) * scale - 0.5
        found = 1 - jnp.abs(jnp.arange(old[axis]) - centre) / jnp.maximum(scale, 1)
        found = jnp.maximum(found, 0)
        return found / jnp.sum(found, axis=-1, keepdims=True)

    both = (weights(0)[..., :, None] * weights(1)[..., None, :]).reshape(*places.shape[:2], -1)
    return jnp.einsum("bln,nc->blc", both, table.astype(jnp.float32), precision="highest")
