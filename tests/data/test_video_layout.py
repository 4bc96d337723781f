"""Visual tokens of videos: pooling and newlines against loops over frames, and what cannot be combined."""

import dataclasses

import numpy as np
import pytest

from mllm_jax.data.anyres import AnyRes, Tiles
from mllm_jax.data.batch import SELECT, SEPARATOR, Combination
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.layout import Slot, WholeImage, layouts
from mllm_jax.data.video_layout import Video, WithVideo

ROWS, COLUMNS, WIDTH = 5, 7, 3
WHOLE = WholeImage(Slot(ROWS * COLUMNS, (35, 35)))


def read(layout, tokens, combination):
    """What the LLM reads: [n, D] of slot tokens [F, M, D]; newlines are NaN."""
    flat = np.concatenate(tokens)
    kept = layout.kept.reshape(len(layout.kept), -1)
    assert kept.shape[1] == combination.taps
    taps = flat[np.maximum(kept, 0)]
    if combination.kind == "max":
        found = taps.max(axis=1)
    else:
        weights = np.ones(kept.shape) if layout.weights is None else layout.weights
        found = (taps * weights[..., None]).sum(axis=1)
    found[kept[:, 0] == SEPARATOR] = np.nan
    return found


def expected(video, tokens):
    """The same by loops over frames, rows and windows."""
    newline, k = np.full((1, WIDTH), np.nan), video.window
    parts = []
    for frame in tokens:
        if video.pool == "max1d":
            grid = [[frame[i : i + k].max(axis=0)] for i in range(0, len(frame) - k + 1, k)]
            grid = np.array(grid).reshape(1, -1, WIDTH)
        else:
            grid = frame.reshape(ROWS, COLUMNS, WIDTH)
        if video.pool in ("max2d", "average2d"):
            reduce = np.max if video.pool == "max2d" else np.mean
            grid = np.array(
                [
                    [reduce(grid[r : r + k, c : c + k], axis=(0, 1)) for c in range(0, COLUMNS - k + 1, k)]
                    for r in range(0, ROWS - k + 1, k)
                ]
            )
        if video.pool == "bilinear2d":
            grid = bilinear(grid, -(-ROWS // k), -(-COLUMNS // k))
        parts.append(grid)
    if video.time == "mean":
        parts = [np.mean(parts, axis=0)]
    found = []
    for grid in parts:
        for row in grid:
            found += [row] + [newline] * (video.newline == "grid")
        found += [newline] * (video.newline == "frame")
    return np.concatenate([*found, *[newline] * (video.newline == "one_token")])


def bilinear(grid, rows, columns):
    """Half-pixel centres, one new token at a time."""
    found = np.zeros((rows, columns, WIDTH))
    for r in range(rows):
        for c in range(columns):
            y = max((r + 0.5) * ROWS / rows - 0.5, 0)
            x = max((c + 0.5) * COLUMNS / columns - 0.5, 0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, ROWS - 1), min(x0 + 1, COLUMNS - 1)
            top = grid[y0, x0] * (1 - x + x0) + grid[y0, x1] * (x - x0)
            low = grid[y1, x0] * (1 - x + x0) + grid[y1, x1] * (x - x0)
            found[r, c] = top * (1 - y + y0) + low * (y - y0)
    return found


POSSIBLE = [
    Video(4, pool=pool, window=window, time=time, newline=newline)
    for pool in ("none", "max1d", "max2d", "average2d", "bilinear2d")
    for window in (2, 3)
    for time in ("concat", "mean")
    for newline in ("no_token", "one_token", "frame", "grid")
    if not (time == "mean" and pool.startswith("max")) and not (pool == "max1d" and newline == "grid")
]


def test_every_pool_and_newline_is_what_loops_compute():
    tokens = np.random.default_rng(0).standard_normal((4, ROWS * COLUMNS, WIDTH))
    for video in POSSIBLE:
        rule = WithVideo(WHOLE, video, (ROWS, COLUMNS))
        for frames in (1, 3, 4, 9):
            layout, shown = rule.of_video(frames), tokens[:frames]
            assert len(layout.slots) == len(shown) <= rule.most_slots
            assert layout.num_tokens <= rule.most_tokens
            found = read(layout, shown, rule.combination)
            np.testing.assert_allclose(found, expected(video, shown), atol=1e-6, err_msg=str((video, frames)))
        image = rule(lambda: (35, 35))  # beside videos, an image stays what it is
        np.testing.assert_allclose(read(image, tokens[:1], rule.combination), tokens[0])


# connectors.md 5, extensions.md 1 and 2
@pytest.mark.parametrize(
    ("patches", "video", "tokens"),
    [
        (24, Video(), 2304),
        (27, Video(), 2912),
        (24, Video(4, pool="none"), 2304),
        (24, Video(4, pool="none", time="mean"), 576),
        (27, Video(32, "linspace", "bilinear2d", newline="one_token"), 6273),
    ],
)
def test_published_numbers_of_tokens(patches, video, tokens):
    rule = WithVideo(WholeImage(Slot(patches**2, (336, 336))), video, (patches, patches))
    assert rule.of_video(1000).num_tokens == rule.most_tokens == tokens


def test_images_in_tiles_share_rows_with_videos():
    slot = Slot(16, (28, 28))
    tiles = AnyRes(slot, Tiles(((1, 2), (2, 2))), (4, 4))
    rule = WithVideo(tiles, Video(3, newline="frame"), (4, 4))
    assert (rule.combination, rule.separated, rule.most_slots) == (Combination(2, "max"), True, 5)
    alone, shared = tiles(lambda: (28, 40)), rule(lambda: (28, 40))
    assert shared.canvas == alone.canvas
    np.testing.assert_array_equal(shared.kept, np.stack([alone.kept, alone.kept], axis=1))
    assert rule(lambda: (28, 40)) is shared  # kept, for many images have one size
    summed = WithVideo(
        dataclasses.replace(tiles, tiles=Tiles(max_tiles=1)), Video(4, pool="bilinear2d"), (4, 4)
    )
    assert summed.combination == Combination(4, "sum")
    assert WithVideo(WHOLE, Video(pool="none"), None).combination == SELECT


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"frames": 0}, "video.frames=0"),
        ({"window": 1}, "video.window=1"),
        ({"pool": "mean"}, "video.pool='mean' is none of"),
        ({"sampling": "fps"}, "video.sampling='fps' is none of"),
        ({"newline": "row"}, "video.newline='row' is none of"),
        ({"time": "mean"}, "video.time='mean' is of frames whose tokens are not maxima"),
    ],
)
def test_impossible_videos(values, said):
    with pytest.raises(ValueError, match=said):
        Video(**values)


def test_impossible_together():
    tiles = AnyRes(Slot(16, (28, 28)), Tiles(max_tiles=1), (4, 4))
    for image, video, grid, said in (
        (tiles, Video(), (4, 4), "takes the max of tokens and model.tiles the sum"),
        (WHOLE, Video(pool="max2d"), None, "lie on none"),
        (WHOLE, Video(newline="grid"), None, "lie on none"),
        (WHOLE, Video(pool="max2d", window=6), (ROWS, COLUMNS), "wider than the grid"),
        (WHOLE, Video(window=40), None, "more than a frame's 35"),
        (WholeImage(Slot(16, (16, 256), native=True)), Video(), None, "vision.max_patches"),
    ):
        with pytest.raises(ValueError, match=said):
            WithVideo(image, video, grid)
    with pytest.raises(SampleError, match=r"sample 's': shows a video, and model\.video\.frames is 0"):
        layouts(WHOLE, [7], sample="s")
