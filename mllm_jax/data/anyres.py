"""AnyRes: high-resolution images as tiles (LLaVA-NeXT, LLaVA-1.6, LLaVA-OneVision; connectors.md 4, extensions.md 1).

An image is brought to the canvas of a list that fits it best, without changing its aspect ratio, and cut into tiles of
the vision encoder's size. Before the tiles stands the whole image, squeezed into one more slot. What the LLM reads are
the whole image's tokens and then those of the tiles, put together to one large grid.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Int

from mllm_jax.data.batch import SELECT, SEPARATOR, Combination, Size
from mllm_jax.data.layout import Slot, VisualLayout

Grid = tuple[int, int]  # rows, columns

LLAVA_16 = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # columns and rows of the canvases of LLaVA-1.6
MERGES = (
    "flat", "spatial", "spatial_nobase", "spatial_unpad", "spatial_unpad_nobase", "spatial_maxpool2x2",
    "spatial_maxpool2x2_nobase",
)  # fmt: skip
SEVERAL = ("tiles", "whole")
ROUNDINGS = ("floor", "round")
_SHRINK = 1.1  # features are shrunk where they are this much too large along a side


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a recipe cuts images into tiles.

    Attributes:
      pinpoints: the canvases as (columns, rows) of tiles; of equally good ones the first is taken.
      merge: what the LLM reads of the tiles, in the words of LLaVA's `mm_patch_merge_type`. "flat": all tokens, slot
        after slot. "spatial": the rows of the grid that all tiles form together. "spatial_unpad": the same without the
        padding, and a learned newline behind every row. "spatial_maxpool2x2": the grid, of every 2 x 2 tokens the
        maximum. With "_nobase" the whole image is left out.
      max_tiles: with "spatial_unpad", grids of more tokens than so many tiles have are shrunk to them, bilinearly
        (9 is OneVision's `anyres_max_9`); 0 = never.
      rounding: how the unpadded size becomes a whole number: "floor" (LLaVA-NeXT), or "round" to 7 digits first
        (transformers). It matters where a floating-point product misses a whole number from below.
      several: images of samples with several: each cut into "tiles" or each "whole" in one slot, padded to a square,
        with one newline behind it where there are newlines.
    """

    pinpoints: tuple[tuple[int, int], ...] = LLAVA_16
    merge: str = "spatial_unpad"
    max_tiles: int = 0
    rounding: str = "floor"
    several: str = "tiles"

    def __post_init__(self):
        for key, value, allowed in (
            ("merge", self.merge, MERGES), ("rounding", self.rounding, ROUNDINGS), ("several", self.several, SEVERAL)
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"tiles.{key}={value!r} is none of {', '.join(allowed)}")
        pairs = [len(pair) == 2 and all(type(n) is int and n > 0 for n in pair) for pair in self.pinpoints]
        if not pairs or not all(pairs):
            raise ValueError(f"tiles.pinpoints={self.pinpoints!r} must be (columns, rows) pairs of tiles")
        if type(self.max_tiles) is not int or self.max_tiles < 0:
            raise ValueError(f"tiles.max_tiles={self.max_tiles!r} must be a whole number, 0 for no limit")
        if self.max_tiles and not self.unpads:
            raise ValueError(
                f"tiles.max_tiles={self.max_tiles} is of merge='spatial_unpad', not {self.merge!r}"
            )

    @property
    def unpads(self) -> bool:
        """Whether padding is left out and rows end with a newline."""
        return "unpad" in self.merge

    @property
    def base(self) -> bool:
        """Whether the whole image stands before the tiles."""
        return "nobase" not in self.merge


@dataclasses.dataclass(frozen=True)
class AnyRes:
    """The rule of images in tiles.

    >>> rule = AnyRes(Slot(576, size=(336, 336)), Tiles(), grid=(24, 24))
    >>> rule(lambda: (480, 640)).num_tokens
    2340

    Attributes:
      slot: one tile, or the whole image.
      tiles: the recipe's.
      grid: rows and columns of a slot's tokens; None for a connector whose tokens have no place in the image.
    """

    slot: Slot
    tiles: Tiles
    grid: Grid | None

    def __post_init__(self):
        if self.slot.size is None or self.slot.size[0] != self.slot.size[1]:
            raise ValueError(f"tiles are squares, and the vision encoder sees {self.slot.size} pixels")
        if self.grid is None and self.tiles.merge != "flat":
            raise ValueError(
                f"tiles.merge={self.tiles.merge!r} puts the tokens of tiles together to one grid, and the tokens of "
                "this connector lie on none; choose 'flat'"
            )

    @property
    def combination(self) -> Combination:
        """Four tokens where the grid is shrunk or pooled."""
        if "maxpool" in self.tiles.merge:
            return Combination(4, "max")
        return Combination(4, "sum") if self.tiles.max_tiles else SELECT

    @property
    def separated(self) -> bool:
        """Whether there are newlines."""
        return self.tiles.unpads

    @property
    def most_slots(self) -> int:
        """Of the largest canvas."""
        return self.tiles.base + max(columns * rows for columns, rows in self.tiles.pinpoints)

    @functools.cached_property
    def most_tokens(self) -> int:
        """No image has more."""
        base = self.tiles.base * self.slot.num_tokens
        tokens = base + max(self._most_of(columns, rows) for columns, rows in self.tiles.pinpoints)
        whole = self.slot.num_tokens + self.separated if self.tiles.several == "whole" else 0
        return max(tokens, whole)

    def _most_of(self, columns: int, rows: int) -> int:
        """Tokens of a canvas that an image covers as far as makes them most."""
        if self.tiles.merge == "flat":
            return columns * rows * self.slot.num_tokens
        high, wide = rows * self.grid[0], columns * self.grid[1]
        if "maxpool" in self.tiles.merge:
            return (high // 2) * (wide // 2)
        if not self.tiles.max_tiles:
            return high * (wide + self.tiles.unpads)
        limit = self.tiles.max_tiles * self.slot.num_tokens
        # As much is left out on one side as on the other (`unpadded`).
        covered = [
            *((left, wide) for left in range(high, 0, -2)),
            *((high, left) for left in range(wide, 0, -2)),
        ]
        return max(height * (width + 1) for height, width in (shrunk(grid, limit) for grid in covered))

    def __call__(self, read_size: Callable[[], Size], images: int = 1, /) -> VisualLayout:
        """The layout of one image; see `LayoutRule`."""
        if images > 1 and self.tiles.several == "whole":
            return _whole(self)
        height, width = read_size()
        return _layout(self, (height, width))


def best_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas on which an image keeps most of its pixels; of equal ones that with the least room around it.

    Args:
      size: height and width of the image.
      canvases: heights and widths; the first of equally good ones is taken.
    """
    height, width = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def fitted(size: Size, canvas: Size) -> Size:
    """Height and width of an image that is resized to fit a canvas, its aspect ratio kept."""
    (height, width), (canvas_height, canvas_width) = size, canvas
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        return min(math.ceil(height * across), canvas_height), canvas_width
    return canvas_height, min(math.ceil(width * down), canvas_width)


def unpadded(size: Size, grid: Grid, rounding: str) -> tuple[slice, slice]:
    """The rows and columns of a grid over a canvas that an image of this size covers."""
    (height, width), (rows, columns) = size, grid

    def margin(whole: int, covered: float) -> slice:
        covered = int(round(covered, 7) if rounding == "round" else covered)
        padding = (whole - covered) // 2
        return slice(padding, whole - padding)

    if width / height > columns / rows:
        return margin(rows, height * (columns / width)), slice(columns)
    return slice(rows), margin(columns, width * (rows / height))


def shrunk(grid: Grid, limit: int) -> Grid:
    """The grid, or a smaller one of this aspect ratio where it has clearly more tokens than `limit`."""
    times = math.sqrt(grid[0] * grid[1] / limit)
    return (int(grid[0] // times), int(grid[1] // times)) if times > _SHRINK else grid


def bilinear(before: int, after: int) -> tuple[Int[np.ndarray, "n 2"], Float32[np.ndarray, "n 2"]]:
    """Along one axis, the two places that each new one lies between, and their weights; half-pixel centres.

    As in torch's `interpolate` without antialiasing, in float32.
    """
    centre = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * (np.float32(before) / np.float32(after))
    centre = np.maximum(centre - np.float32(0.5), np.float32(0))
    low = centre.astype(np.int64)
    share = centre - low.astype(np.float32)
    return np.stack([low, np.minimum(low + 1, before - 1)], -1), np.stack([1 - share, share], -1)


Taps = tuple[Int[np.ndarray, "... K"], Float32[np.ndarray, "... K"]]  # slot tokens and their weights


def _selected(index: Int[np.ndarray, "..."], taps: int) -> Taps:
    """Single slot tokens in the form of combinations: the same one K times, all weight on the first."""
    weights = np.zeros((*index.shape, taps), np.float32)
    weights[..., 0] = 1
    return np.repeat(index[..., None], taps, axis=-1), weights


def _shrink(index: Int[np.ndarray, "r c"], grid: Grid) -> Taps:
    """A grid of slot tokens resized to a smaller one."""
    (rows, down), (columns, across) = (bilinear(b, a) for b, a in zip(index.shape, grid, strict=True))
    taps = index[rows[:, None, :, None], columns[None, :, None, :]]
    weights = down[:, None, :, None] * across[None, :, None, :]
    return taps.reshape(*grid, 4), weights.reshape(*grid, 4)


def _pool(index: Int[np.ndarray, "r c"]) -> Taps:
    """The 2 x 2 windows of a grid of slot tokens; a last odd row or column is dropped."""
    rows, columns = index.shape[0] // 2, index.shape[1] // 2
    windows = index[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3)
    return windows.reshape(rows, columns, 4), np.ones((rows, columns, 4), np.float32)


def _merge(rule: AnyRes, index: Int[np.ndarray, "r c"], size: Size) -> Taps:
    """What is read of the grid of all tiles' tokens, row by row, with what ends the rows."""
    tiles, taps = rule.tiles, rule.combination.taps
    if "maxpool" in tiles.merge:
        found = _pool(index)
    elif not tiles.unpads:
        found = _selected(index, taps)
    else:
        index = index[unpadded(size, index.shape, tiles.rounding)]
        small = index.shape
        if tiles.max_tiles:
            small = shrunk(index.shape, tiles.max_tiles * rule.grid[0] * rule.grid[1])
        found = _selected(index, taps) if small == index.shape else _shrink(index, small)
        newline = _selected(np.full((small[0], 1), SEPARATOR), taps)
        found = tuple(np.concatenate(pair, axis=1) for pair in zip(found, newline, strict=True))
    return found[0].reshape(-1, taps), found[1].reshape(-1, taps)


def _finished(rule: AnyRes, parts: Sequence[Taps], slots: int, canvas: Size | None) -> VisualLayout:
    kept, weights = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    combination = rule.combination
    return VisualLayout(
        (rule.slot,) * slots,
        kept if combination.taps > 1 else kept[:, 0],
        weights if combination.weighted else None,
        canvas,
    )


@functools.lru_cache(maxsize=256)
def _layout(rule: AnyRes, size: Size) -> VisualLayout:
    """The layout of an image of this size in tiles."""
    tiles, (side, _), taps = rule.tiles, rule.slot.size, rule.combination.taps
    canvas = best_canvas(size, [(rows * side, columns * side) for columns, rows in tiles.pinpoints])
    rows, columns = canvas[0] // side, canvas[1] // side
    slots = tiles.base + rows * columns
    index, base = np.arange(slots * rule.slot.num_tokens), tiles.base * rule.slot.num_tokens
    if tiles.merge == "flat":
        return _finished(rule, [_selected(index, taps)], slots, canvas)
    high, wide = rule.grid
    grid = index[base:].reshape(rows, columns, high, wide).transpose(0, 2, 1, 3)
    grid = grid.reshape(rows * high, columns * wide)
    return _finished(rule, [_selected(index[:base], taps), _merge(rule, grid, size)], slots, canvas)


@functools.lru_cache(maxsize=16)
def _whole(rule: AnyRes) -> VisualLayout:
    """The layout of an image that is one slot."""
    index = np.append(np.arange(rule.slot.num_tokens), np.full(int(rule.separated), SEPARATOR))
    return _finished(rule, [_selected(index, rule.combination.taps)], 1, None)
