"""How the frames of a video become visual tokens (connectors.md 5, extensions.md 1 and 2).

Every frame is one image slot, which holds all of it. Of the tokens of its slots a video keeps all, or the maximum or
the mean of small windows; frame after frame or as one mean over time, with a learned newline where the recipe has one.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int

from mllm_jax.data.anyres import bilinear
from mllm_jax.data.batch import SELECT, SEPARATOR, Combination, Size
from mllm_jax.data.layout import LayoutRule, Slot, VisualLayout
from mllm_jax.data.video import SAMPLINGS

POOLS = ("none", "max1d", "max2d", "average2d", "bilinear2d")
TIMES = ("concat", "mean")
NEWLINES = ("no_token", "one_token", "frame", "grid")

Grid = tuple[int, int]  # rows, columns
Taps = tuple[Int[np.ndarray, "... K"], Float32[np.ndarray, "... K"]]  # slot tokens and their weights


@dataclasses.dataclass(frozen=True)
class Video:
    """How a recipe reads videos; the defaults are Dense Connector's, `Video(frames=4, pool="none")` is FreeVA's.

    Attributes:
      frames: that are picked of a video; of a shorter one all.
      sampling: which; see `video.SAMPLINGS`.
      pool: what is kept of a frame's tokens. "none": all. "max1d": the maximum of so many neighbours in their order.
        "max2d", "average2d": the maximum or the mean of square windows of the grid. "bilinear2d": the grid shrunk by
        so much, bilinearly without antialiasing (OneVision). What is over at an edge is dropped, with "bilinear2d" not.
      window: so many tokens, along a side with the pools that end in "2d".
      time: "concat": frame after frame. "mean": the mean over all frames, token by token.
      newline: the learned newline: none, "one_token" at the end, behind every "frame", or behind every row of the
        "grid" (LLaVA-NeXT's `mm_newline_position`).
    """

    frames: int = 8
    sampling: str = "segments"
    pool: str = "max1d"
    window: int = 2
    time: str = "concat"
    newline: str = "no_token"

    def __post_init__(self):
        for key, allowed in (
            ("sampling", tuple(SAMPLINGS)), ("pool", POOLS), ("time", TIMES), ("newline", NEWLINES)
        ):  # fmt: skip
            if (value := getattr(self, key)) not in allowed:
                raise ValueError(f"video.{key}={value!r} is none of {', '.join(allowed)}")
        for key, least in (("frames", 1), ("window", 2)):
            if type(value := getattr(self, key)) is not int or value < least:
                raise ValueError(f"video.{key}={value!r} must be a whole number, at least {least}")
        if self.time == "mean" and self.pool.startswith("max"):
            raise ValueError(
                f"video.time='mean' is of frames whose tokens are not maxima: with video.pool={self.pool!r} choose "
                "'concat', or with 'mean' the pool 'none' or 'average2d'"
            )

    @property
    def picked(self) -> tuple[int, str]:
        """Which frames are: their number and how they are chosen."""
        return self.frames, self.sampling

    @property
    def on_grid(self) -> bool:
        """Whether tokens must have a place in the frame."""
        return self.pool.endswith("2d") or self.newline == "grid"

    @property
    def combination(self) -> Combination:
        """Of how many slot tokens a visual token is made."""
        taps = {"none": 1, "max1d": self.window, "bilinear2d": 4}.get(self.pool, self.window**2)
        if self.pool.startswith("max"):
            return Combination(taps, "max")
        taps *= self.frames if self.time == "mean" else 1
        return Combination(taps, "sum") if taps > 1 else SELECT


def shared(images: Combination, videos: Combination) -> Combination:
    """One way to make visual tokens that both images and videos can be written in.

    Raises:
      ValueError: there is none.
    """
    if SELECT in (images, videos):
        return images if videos == SELECT else videos
    if images.kind != videos.kind:
        raise ValueError(
            f"video.pool takes the {videos.kind} of tokens and model.tiles the {images.kind}; take pools of one kind "
            "(maxima: 'max1d', 'max2d' and tiles.merge 'spatial_maxpool2x2'; sums: 'average2d', 'bilinear2d' and "
            "tiles.max_tiles), or no pool"
        )
    return Combination(max(images.taps, videos.taps), images.kind)


@dataclasses.dataclass(frozen=True)
class WithVideo:
    """The rule of a recipe that reads images and videos.

    >>> from mllm_jax.data.layout import WholeImage
    >>> rule = WithVideo(WholeImage(Slot(576, size=(336, 336))), Video(), grid=(24, 24))
    >>> rule.of_video(100).num_tokens, rule(lambda: (480, 640)).num_tokens
    (2304, 576)

    Attributes:
      image: the rule of images.
      video: how videos are read.
      grid: rows and columns of a slot's tokens; None for a connector whose tokens have no place in the image.
    """

    image: LayoutRule
    video: Video
    grid: Grid | None

    def __post_init__(self):
        if self.slot.native:
            raise ValueError(
                "videos are read as frames of one size, and with vision.max_patches every frame has its own: give the "
                "frames as images, or set vision.max_patches=0 (square frames) or video.frames=0 (no videos)"
            )
        if self.grid is None and self.video.on_grid:
            raise ValueError(
                f"video.pool={self.video.pool!r} and video.newline={self.video.newline!r} are of tokens on a grid, and "
                "the tokens of this connector lie on none; choose pool 'none' or 'max1d' and another newline"
            )
        if self.grid is not None and self.video.pool in ("max2d", "average2d"):
            if min(self.grid) < self.video.window:
                raise ValueError(f"video.window={self.video.window} is wider than the grid of {self.grid}")
        elif self.video.pool == "max1d" and self.slot.num_tokens < self.video.window:
            raise ValueError(
                f"video.window={self.video.window} is more than a frame's {self.slot.num_tokens} visual tokens"
            )
        shared(self.image.combination, self.video.combination)

    @property
    def slot(self) -> Slot:
        """One frame, one tile or one image."""
        return self.image.slot

    @functools.cached_property
    def combination(self) -> Combination:
        """That of images and videos alike, for they share rows."""
        return shared(self.image.combination, self.video.combination)

    @property
    def separated(self) -> bool:
        """Whether images or videos have newlines."""
        return self.image.separated or self.video.newline != "no_token"

    @property
    def most_slots(self) -> int:
        """Of the largest image or the longest video."""
        return max(self.image.most_slots, self.video.frames)

    @functools.cached_property
    def most_tokens(self) -> int:
        """Likewise."""
        return max(self.image.most_tokens, self.of_video(self.video.frames).num_tokens)

    def __call__(self, read_size: Callable[[], Size], images: int = 1, /) -> VisualLayout:
        """The layout of an image; see `LayoutRule`."""
        return _widened(self.image(read_size, images), self.combination)

    def of_video(self, frames: int) -> VisualLayout:
        """The layout of a video of so many frames."""
        return _of_video(self, min(frames, self.video.frames))


@functools.lru_cache(maxsize=512)  # rules give one layout to all images of a size
def _widened(layout: VisualLayout, combination: Combination) -> VisualLayout:
    """The same visual tokens, written as combinations of more slot tokens."""
    kept, weights = layout.kept, layout.weights
    missing = combination.taps - (1 if kept.ndim == 1 else kept.shape[1])
    if not missing:
        return layout
    kept = kept.reshape(len(kept), -1)
    if combination.weighted:
        weights = np.ones(kept.shape, np.float32) if weights is None else weights
        weights = np.pad(weights, ((0, 0), (0, missing)))
    kept = np.concatenate([kept, np.repeat(kept[:, :1], missing, axis=1)], axis=1)
    return dataclasses.replace(layout, kept=kept, weights=weights)


@functools.lru_cache(maxsize=64)
def _of_video(rule: WithVideo, frames: int) -> VisualLayout:
    video, tokens = rule.video, rule.slot.num_tokens
    taps, weights = _pooled(rule)  # of the first frame: [..., K], in rows where there is a grid
    if video.time == "mean":
        along = [taps + frame * tokens for frame in range(frames)]
        parts = [(np.concatenate(along, axis=-1), np.concatenate([weights] * frames, axis=-1) / frames)]
    else:
        parts = [(taps + frame * tokens, weights) for frame in range(frames)]
    if video.newline == "grid":
        parts = [_with_newline(part, axis=1) for part in parts]
    parts = [tuple(each.reshape(-1, each.shape[-1]) for each in part) for part in parts]
    if video.newline == "frame":
        parts = [_with_newline(part, axis=0) for part in parts]
    taps, weights = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    if video.newline == "one_token":
        taps, weights = _with_newline((taps, weights), axis=0)
    layout = VisualLayout(
        (rule.slot,) * frames,
        taps if taps.shape[1] > 1 else taps[:, 0],
        weights.astype(np.float32) if rule.combination.weighted else None,
    )
    return _widened(layout, rule.combination)


def _pooled(rule: WithVideo) -> Taps:
    """What is kept of the first frame: [rows, columns, K], or [n, K] of tokens without a grid."""
    video, window = rule.video, rule.video.window
    index = np.arange(rule.slot.num_tokens)
    if video.pool == "max1d":
        taps = index[: len(index) // window * window].reshape(-1, window)
        return taps, np.ones(taps.shape, np.float32)
    grid = index if rule.grid is None else index.reshape(rule.grid)
    if video.pool == "none":
        return grid[..., None], np.ones((*grid.shape, 1), np.float32)
    if video.pool == "bilinear2d":
        (rows, down), (columns, across) = (bilinear(side, -(-side // window)) for side in grid.shape)
        taps = grid[rows[:, None, :, None], columns[None, :, None, :]]
        weights = down[:, None, :, None] * across[None, :, None, :]
        return taps.reshape(*taps.shape[:2], 4), weights.reshape(*taps.shape[:2], 4)
    rows, columns = (side // window for side in grid.shape)
    windows = grid[: rows * window, : columns * window].reshape(rows, window, columns, window)
    taps = windows.transpose(0, 2, 1, 3).reshape(rows, columns, window**2)
    share = 1 / window**2 if video.pool == "average2d" else 1
    return taps, np.full(taps.shape, share, np.float32)


def _with_newline(part: Taps, axis: int) -> Taps:
    """One newline more along an axis."""
    shape = [*part[0].shape[:axis], 1, *part[0].shape[axis + 1 :]]
    return (
        np.concatenate([part[0], np.full(shape, SEPARATOR)], axis=axis),
        np.concatenate([part[1], np.zeros(shape, np.float32)], axis=axis),
    )
