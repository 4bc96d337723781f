"""Images in tiles: counts against published tables and transformers' processors, pixels and grids against theirs."""

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.anyres import MERGES, AnyRes, Tiles, bilinear, unpadded
from mllm_jax.data.batch import SEPARATOR, Combination
from mllm_jax.data.layout import Slot, VisualLayout
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.tiles import slot_images

ONEVISION = tuple((columns, rows) for columns in range(1, 7) for rows in range(1, 7))
# transformers lists heights first; the order decides between equally good canvases
ONEVISION_HF = tuple((columns, rows) for rows in range(1, 7) for columns in range(1, 7))

CLIP = AnyRes(Slot(576, (336, 336)), Tiles(), (24, 24))
SIGLIP = AnyRes(Slot(729, (384, 384)), Tiles(), (27, 27))
CLIP_HF = AnyRes(CLIP.slot, Tiles(((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)), rounding="round"), (24, 24))
MAX_9 = AnyRes(Slot(729, (384, 384)), Tiles(ONEVISION, max_tiles=9, several="whole"), (27, 27))
MAX_9_HF = AnyRes(Slot(729, (384, 384)), Tiles(ONEVISION_HF, max_tiles=9, rounding="round"), (27, 27))


def of(rule, width, height, images=1):
    return rule(lambda: (height, width), images)


# width, height: canvas (width, height), unpadded rows x columns, visual tokens, slots (connectors.md 4)
@pytest.mark.parametrize(
    ("size", "clip", "siglip"),
    [
        ((640, 480), ((672, 672), 36, 48, 2340, 5), ((768, 768), 40, 54, 2929, 5)),
        ((480, 640), ((672, 672), 48, 36, 2352, 5), ((768, 768), 54, 40, 2943, 5)),
        ((336, 336), ((336, 672), 24, 24, 1176, 3), ((384, 768), 28, 27, 1513, 3)),
        ((100, 100), ((336, 672), 24, 24, 1176, 3), ((384, 768), 28, 27, 1513, 3)),
        ((1000, 500), ((672, 336), 24, 48, 1752, 3), ((768, 384), 27, 54, 2214, 3)),
        ((500, 1000), ((336, 672), 48, 24, 1776, 3), ((384, 768), 54, 27, 2241, 3)),
        ((1920, 1080), ((672, 672), 28, 48, 1948, 5), ((768, 768), 30, 54, 2379, 5)),
        ((300, 900), ((336, 1008), 72, 24, 2376, 4), ((384, 1152), 81, 27, 2997, 4)),
        ((2000, 400), ((1008, 336), 14, 72, 1598, 4), ((1152, 384), 17, 81, 2123, 4)),
        ((1024, 1024), ((672, 672), 48, 48, 2928, 5), ((768, 768), 54, 54, 3699, 5)),
        ((384, 384), ((672, 672), 48, 48, 2928, 5), None),
        ((800, 6000), ((336, 1008), 72, 10, 1368, 4), None),
    ],
)
def test_llava_16(size, clip, siglip):
    for rule, expected in ((CLIP, clip), (SIGLIP, siglip)):
        if expected is None:
            continue
        canvas, rows, columns, tokens, slots = expected
        layout = of(rule, *size)
        assert layout.canvas == canvas[::-1]
        assert (layout.num_tokens, len(layout.slots)) == (tokens, slots)
        assert (layout.kept == SEPARATOR).sum() == rows
        assert tokens == rule.slot.num_tokens + rows * (columns + 1)


# width, height: canvas (width, height), slots, final rows x columns, visual tokens (extensions.md 1)
@pytest.mark.parametrize(
    ("size", "canvas", "slots", "grid", "tokens"),
    [
        ((384, 384), (384, 384), 2, (27, 27), 1485),
        ((100, 100), (384, 384), 2, (27, 27), 1485),
        ((640, 480), (768, 768), 5, (40, 54), 2929),
        ((768, 768), (768, 768), 5, (54, 54), 3699),
        ((1000, 500), (1152, 768), 7, (40, 81), 4009),
        ((2000, 400), (2304, 768), 13, (32, 162), 5945),
        ((1024, 1024), (1152, 1152), 10, (81, 81), 7371),
        ((1536, 1536), (1536, 1536), 17, (81, 81), 7371),
        ((1920, 1080), (1920, 1152), 16, (60, 108), 7269),
        ((4000, 3000), (2304, 1920), 31, (70, 93), 7309),
        ((3840, 2160), (2304, 1536), 25, (61, 107), 7317),
        ((800, 6000), (384, 2304), 7, (162, 21), 4293),
    ],
)
def test_onevision(size, canvas, slots, grid, tokens):
    layout = of(MAX_9, *size)
    assert (layout.canvas, len(layout.slots), layout.num_tokens) == (canvas[::-1], slots, tokens)
    assert ((layout.kept == SEPARATOR).all(axis=1).sum(), tokens) == (grid[0], 729 + grid[0] * (grid[1] + 1))
    assert tokens <= MAX_9.most_tokens
    assert slots <= MAX_9.most_slots == 37
    np.testing.assert_allclose(layout.weights.sum(axis=1), 1, atol=1e-6)
    assert of(MAX_9, *size, images=2).num_tokens == 730


@pytest.mark.parametrize(("size", "floor", "rounded"), [((820, 369), 2349, 2403), ((1107, 820), 5567, 5731)])
def test_rounding(size, floor, rounded):
    assert of(MAX_9, *size).num_tokens == floor
    rule = AnyRes(MAX_9.slot, Tiles(ONEVISION, max_tiles=9, rounding="round"), (27, 27))
    assert of(rule, *size).num_tokens == rounded


@pytest.mark.slow
@pytest.mark.parametrize("several", ["tiles", "whole"])
@pytest.mark.parametrize("merge", MERGES)
def test_the_largest_layout_is_one_that_an_image_has(merge, several):
    """`most_tokens` is reached, so that plans and reports do not speak of images that there are not."""
    for max_tiles in (0, 1, 2) if merge == "spatial_unpad" else (0,):
        tiles = Tiles(((1, 1), (1, 2), (2, 1), (2, 2), (3, 1)), merge, max_tiles=max_tiles, several=several)
        rule = AnyRes(Slot(15, (28, 28)), tiles, (3, 5))
        alone = {
            of(rule, width, height).num_tokens for width in range(4, 88, 4) for height in range(4, 60, 4)
        }
        assert max(alone | {of(rule, 28, 28, images=2).num_tokens}) == rule.most_tokens


def random_sizes(count):
    rng = np.random.default_rng(0)
    return np.exp(rng.uniform(np.log(20), np.log(5000), (count, 2))).astype(int).tolist()


def processor(family, **options):
    name = {"LlavaNext": "llava_next", "LlavaOnevision": "llava_onevision"}[family]
    module = pytest.importorskip(f"transformers.models.{name}.image_processing_pil_{name}")
    return getattr(module, f"{family}ImageProcessorPil")(**options)


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["LlavaNext", "LlavaOnevision"])
def test_counts_equal_transformers_on_random_sizes(family, count):
    """Their processors' own arithmetic, which needs no tokenizer."""
    name = {"LlavaNext": "llava_next", "LlavaOnevision": "llava_onevision"}[family]
    module = pytest.importorskip(f"transformers.models.{name}.processing_{name}")
    theirs = getattr(module, f"{family}Processor").__new__(getattr(module, f"{family}Processor"))
    theirs.image_processor, theirs.patch_size, theirs.num_additional_image_tokens = processor(family), 14, 0
    theirs.num_image_tokens, theirs.vision_aspect_ratio = 729, "anyres_max_9"
    side, rule = (336, CLIP_HF) if family == "LlavaNext" else (384, MAX_9_HF)
    for height, width in random_sizes(count):
        expected = theirs._get_number_of_features(height, width, side, side)
        layout = of(rule, width, height)
        assert layout.num_tokens == expected, (height, width)
        assert layout.num_tokens <= rule.most_tokens


SHAPES = [(30, 41), (90, 28), (56, 56), (57, 200), (333, 201), (3, 90), (90, 3), (112, 61)]


def picture(height, width):
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_equal_llava_next(shape):
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    theirs = processor(
        "LlavaNext",
        image_grid_pinpoints=pinpoints,
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
    )
    rule, ours = AnyRes(Slot(4, (28, 28)), Tiles(), (2, 2)), ImageProcessor.clip(28, "pad")
    image = picture(*shape)
    expected = theirs(Image.fromarray(image), do_rescale=False, do_normalize=False, return_tensors="np")
    found = slot_images(ours, image, of(rule, *shape[::-1]))
    np.testing.assert_array_equal(found, np.moveaxis(expected["pixel_values"][0], 1, -1))
    expected = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(np.moveaxis(ours.normalize(found), -1, 1), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_equal_onevision(shape):
    pinpoints = [[28 * rows, 28 * columns] for columns, rows in ONEVISION_HF]
    theirs = processor(
        "LlavaOnevision",
        image_grid_pinpoints=pinpoints,
        size={"height": 28, "width": 28},
        image_mean=[0.5] * 3,
    )
    rule = AnyRes(Slot(4, (28, 28)), Tiles(ONEVISION_HF, max_tiles=9, several="whole"), (2, 2))
    ours = ImageProcessor.siglip(28, "pad")
    image, flags = picture(*shape), {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    expected = theirs(Image.fromarray(image), **flags)["pixel_values"][0]
    found = slot_images(ours, Image.fromarray(image), of(rule, *shape[::-1]))
    np.testing.assert_array_equal(found, np.moveaxis(expected, 1, -1))
    pair = theirs([[Image.fromarray(image)] * 2], **flags)["pixel_values"]  # several images: each whole
    found = slot_images(ours, image, of(rule, *shape[::-1], images=2))
    np.testing.assert_array_equal(found, np.moveaxis(pair[0], 1, -1))


def test_a_crop_of_a_larger_image_is_cut_from_every_slot():
    ours = ImageProcessor(28, "crop", *[(0.5,) * 3] * 2, shortest_side=32)
    image = picture(40, 70)
    found = slot_images(ours, image, of(AnyRes(Slot(4, (28, 28)), Tiles(), (2, 2)), 70, 40))
    whole = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found[0], whole[2:30, 2:30])


def combined(layout, tokens, newline, kind="sum"):
    """Visual tokens by the meaning of a layout."""
    kept = layout.kept.reshape(len(layout.kept), -1)
    rows = np.where((kept[..., None] == SEPARATOR), newline, tokens[np.maximum(kept, 0)])
    if kind == "max":
        return rows.max(axis=1)
    weights = np.ones(kept.shape) if layout.weights is None else layout.weights
    return (rows * weights[..., None]).sum(axis=1)


def grid_of(tokens, rows, columns, side):
    """Tiles' tokens as one grid, by the definition: the token of row r and column c."""
    out = np.empty((rows * side, columns * side, tokens.shape[-1]))
    for r in range(rows * side):
        for c in range(columns * side):
            tile = (r // side) * columns + c // side
            out[r, c] = tokens[tile * side**2 + (r % side) * side + c % side]
    return out


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_nobase", "spatial_unpad", "spatial_unpad_nobase",
                                   "spatial_maxpool2x2", "spatial_maxpool2x2_nobase"])  # fmt: skip
def test_merging_by_definition(merge):
    rule = AnyRes(Slot(9, (30, 30)), Tiles(merge=merge), (3, 3))
    layout = of(rule, 90, 40)  # on a canvas of 2 x 2 tiles
    tokens, newline = np.random.default_rng(0).standard_normal((len(layout.slots) * 9, 5)), np.full(5, 7.0)
    base = 0 if "nobase" in merge else 9
    tiles = tokens[base:]
    if merge == "flat":
        expected = tokens
    else:
        grid = grid_of(tiles, layout.canvas[0] // 30, layout.canvas[1] // 30, 3)
        if "unpad" in merge:
            grid = grid[unpadded((40, 90), grid.shape[:2], "floor")]
            grid = np.concatenate([grid, np.broadcast_to(newline, (len(grid), 1, 5))], axis=1)
        if "maxpool" in merge:
            r, c = grid.shape[0] // 2, grid.shape[1] // 2
            grid = grid[: 2 * r, : 2 * c].reshape(r, 2, c, 2, 5).max(axis=(1, 3))
        expected = np.concatenate([tokens[:base], grid.reshape(-1, 5)])
    assert len(layout.slots) == (base > 0) + layout.canvas[0] * layout.canvas[1] // 900
    kind = rule.combination.kind
    np.testing.assert_allclose(combined(layout, tokens, newline, kind), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"), [((75, 135), (60, 108)), ((121, 162), (70, 93)), ((9, 7), (4, 5))]
)
def test_bilinear_equals_torch(before, after):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(before).astype(np.float32)
    (rows, down), (columns, across) = (bilinear(b, a) for b, a in zip(before, after, strict=True))
    half = (values[rows] * down[..., None]).sum(axis=1)
    found = (half[:, columns] * across).sum(axis=-1)
    expected = torch.nn.functional.interpolate(torch.tensor(values)[None, None], after, mode="bilinear")[0, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_an_image_of_one_line_keeps_its_whole_view_and_no_row():
    layout = of(CLIP, 2000, 1)
    assert layout.num_tokens == 576
    with pytest.raises(ValueError, match="at least one visual token"):
        of(AnyRes(CLIP.slot, Tiles(merge="spatial_unpad_nobase"), CLIP.grid), 2000, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": "spatial_max"}, "tiles.merge='spatial_max' is none of flat"),
        ({"rounding": "ceil"}, "tiles.rounding"),
        ({"several": "first"}, "tiles.several"),
        ({"pinpoints": ()}, "tiles.pinpoints"),
        ({"pinpoints": ((0, 1),)}, "tiles.pinpoints"),
        ({"max_tiles": 9, "merge": "spatial"}, "tiles.max_tiles=9 is of merge='spatial_unpad'"),
        ({"max_tiles": -1}, "tiles.max_tiles"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**change)


def test_tokens_without_a_grid_are_read_tile_by_tile():
    with pytest.raises(ValueError, match="choose 'flat'"):
        AnyRes(Slot(7, (28, 28)), Tiles(), None)
    rule = AnyRes(Slot(7, (28, 28)), Tiles(merge="flat"), None)
    layout = of(rule, 100, 90)
    np.testing.assert_array_equal(layout.kept, np.arange(5 * 7))
    assert rule.combination == Combination()
    assert not rule.separated
    assert isinstance(layout, VisualLayout)
