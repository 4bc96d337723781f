"""Images at their own aspect ratio: grids of the reference, and pixels of transformers' torch-free processor."""

import numpy as np
import pytest

from mllm_jax.data.layout import LayoutRule, Slot
from mllm_jax.data.naflex import NaFlexProcessor, NativeAspect, native_grid

GRIDS = {
    256: {(480, 640): (14, 18), (384, 384): (16, 16), (1080, 1920): (12, 21), (400, 2000): (7, 35)},
    576: {(480, 640): (21, 27), (384, 384): (24, 24), (1080, 1920): (18, 32), (400, 2000): (11, 52)},
    1024: {(480, 640): (27, 36), (384, 384): (32, 32), (1080, 1920): (24, 42), (400, 2000): (14, 70)},
}


@pytest.mark.parametrize("limit", GRIDS)
def test_grids_of_the_reference(limit):
    for size, grid in GRIDS[limit].items():
        assert native_grid(size, 16, limit) == grid
        rule = NativeAspect(Slot(limit, size=(16, 16 * limit), native=True), 16)
        layout = rule(lambda size=size: size)
        assert layout.num_tokens == grid[0] * grid[1]
        assert layout.grid == grid
    assert isinstance(rule, LayoutRule)


def test_equal_to_the_processor_of_transformers():
    """Grids of 5,000 random sizes; pixels, mask and shapes of images of every shape, small and extreme ones too."""
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    rng = np.random.default_rng(0)
    limits = rng.choice([16, 256, 576, 1024], 5000)
    for (height, width), limit in zip(
        rng.integers(1, 4000, (5000, 2)).tolist(), limits.tolist(), strict=True
    ):
        theirs = module.get_image_size_for_max_num_patches(height, width, 16, limit)
        rows, columns = native_grid((height, width), 16, limit)
        assert (rows * 16, columns * 16) == theirs, (height, width, limit)

    sizes = [
        (1, 1),
        (3, 700),
        (900, 2),
        (16, 16),
        (48, 64),
        (123, 457),
        (640, 480),
        *rng.integers(5, 300, (12, 2)).tolist(),
    ]
    for limit, patch in ((16, 16), (64, 16), (100, 14)):
        theirs = module.Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=limit)
        ours = NaFlexProcessor(patch, limit)
        for height, width in sizes:
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            expected = theirs(image, return_tensors="np", input_data_format="channels_last")
            strip = ours(image)
            assert strip.shape == (*ours.shape, 3)
            grid = native_grid((height, width), patch, limit)
            assert tuple(expected["spatial_shapes"][0]) == grid
            count = grid[0] * grid[1]
            assert expected["pixel_attention_mask"][0].sum() == count
            patches = strip.reshape(patch, limit, patch, 3).transpose(1, 0, 2, 3).reshape(limit, -1)
            values = (patches[:count].astype(np.float32) / 255 - 0.5) / 0.5
            # One grey level is 2 / 255 here: equal up to the rounding of float32.
            np.testing.assert_allclose(
                values, expected["pixel_values"][0, :count], atol=1e-5, err_msg=f"{height}x{width}"
            )
            assert not patches[count:].any()
