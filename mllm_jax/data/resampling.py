"""Pillow's antialiased resizing along one axis, for a few output pixels, of an image that is never made.

Extreme aspect ratios need huge intermediate images: LLaVA pads a strip of 1 x 30,000 pixels to a square of
2.7 GB, CLIP enlarges it to 336 x 10,080,000 and keeps the middle. Computing just the pixels that are kept
needs next to nothing. The arithmetic is Pillow's: weights in fixed point with 22 fractional bits, sums
rounded to uint8 after each axis.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64, UInt8

_BITS = 22


def _cubic(x: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = np.abs(x)
    near = ((1.5 * x) - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    return np.maximum(0.0, 1 - np.abs(x))


KERNELS: dict[str, tuple[Callable, float]] = {"bicubic": (_cubic, 2.0), "bilinear": (_triangle, 1.0)}


def _window(length: int, resized: int, index: int, kernel: str) -> tuple[int, Int64[np.ndarray, " k"]]:
    """First input pixel and the weights that make output pixel ``index``."""
    function, support = KERNELS[kernel]
    scale = length / resized
    stretch = max(scale, 1.0)
    centre = (index + 0.5) * scale
    first = max(int(centre - support * stretch + 0.5), 0)
    last = min(int(centre + support * stretch + 0.5), length)
    weights = function((np.arange(first, last) - centre + 0.5) * (1.0 / stretch))
    weights = weights / np.cumsum(weights)[-1]  # summed one by one, as Pillow does
    return first, np.trunc(weights * (1 << _BITS) + np.copysign(0.5, weights)).astype(np.int64)


def resample_rows(
    rows: UInt8[np.ndarray, "r w 3"],
    *,
    padded: int,
    fill: tuple[int, int, int],
    resized: int,
    size: int,
    kernel: str,
) -> UInt8[np.ndarray, "r {size} 3"]:
    """Centre rows in a longer row, resize that and keep the middle.

    Args:
        rows: r rows of w pixels.
        padded: length of the row in whose middle they lie (w or more).
        fill: colour of its other pixels.
        resized: length to which it is resized.
        size: how many pixels of the result's middle are kept.
        kernel: a name in ``KERNELS``.
    """
    left = (padded - rows.shape[1]) // 2
    crop = (resized - size) // 2
    colour = np.asarray(fill, np.int64)
    out = np.empty((rows.shape[0], size, 3), np.uint8)
    for column in range(size):
        first, weights = _window(padded, resized, crop + column, kernel)
        start, stop = (min(max(edge - left, 0), rows.shape[1]) for edge in (first, first + len(weights)))
        inside = weights[start + left - first : stop + left - first]
        outside = weights.sum() - inside.sum()
        total = np.einsum("k,rkc->rc", inside, rows[:, start:stop].astype(np.int64))
        total += outside * colour + (1 << (_BITS - 1))
        out[:, column] = np.clip(total >> _BITS, 0, 255)
    return out
