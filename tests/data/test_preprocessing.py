"""Preprocessing against transformers' processors (the Pillow versions, no torch) and against definitions."""

import dataclasses
import hashlib
import importlib
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mllm_jax.data import preprocessing
from mllm_jax.data.preprocessing import CLIP_MEAN, CLIP_STD, ImageProcessor, UnsupportedProcessorError

SHAPES = [(30, 41), (41, 30), (56, 56), (57, 56), (200, 333), (333, 201), (1, 9), (9, 1), (1, 700), (611, 2)]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def oracle(family, **options):
    """An official image processor in its Pillow version, as in transformers 5.23; without scaling."""
    name = family.lower()
    module = pytest.importorskip(f"transformers.models.{name}.image_processing_pil_{name}")
    processor = getattr(module, f"{family}ImageProcessorPil")(**options)

    def call(image, **flags):
        out = processor(Image.fromarray(image), return_tensors="np", **flags)["pixel_values"][0]
        return np.moveaxis(out, 0, -1)

    return call


UNSCALED = {"do_rescale": False, "do_normalize": False}
CLIP_56 = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}


def expand_to_square(image, fill):
    """LLaVA's rule, from its definition: the picture centred on a square of the fill colour."""
    height, width = image.shape[:2]
    side = max(height, width)
    out = np.empty((side, side, 3), np.uint8)
    out[:] = fill
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = image
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_equals_transformers(shape):
    image = picture(*shape)
    expected = oracle("CLIP", **CLIP_56)
    ours = ImageProcessor.clip(56)
    np.testing.assert_array_equal(ours(image), expected(image, **UNSCALED))
    np.testing.assert_allclose(ours.normalize(ours(image)), expected(image), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_siglip_equals_transformers(shape):
    image = picture(*shape)
    expected = oracle("Siglip", size={"height": 56, "width": 56})
    ours = ImageProcessor.siglip(56)
    np.testing.assert_array_equal(ours(image), expected(image, **UNSCALED))
    np.testing.assert_allclose(ours.normalize(ours(image)), expected(image), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_llava_padding(family, shape):
    image = picture(*shape)
    if family == "CLIP":
        ours, fill = ImageProcessor.clip(56, aspect="pad"), (122, 116, 104)
        expected = oracle("Llava", do_pad=True, **CLIP_56)(image, **UNSCALED)
        np.testing.assert_array_equal(ours(image), expected)
        expected = oracle("CLIP", **CLIP_56)(expand_to_square(image, fill), **UNSCALED)
    else:
        ours, fill = ImageProcessor.siglip(56, aspect="pad"), (127, 127, 127)
        processor = oracle("Siglip", size={"height": 56, "width": 56})
        expected = processor(expand_to_square(image, fill), **UNSCALED)
    assert ours.fill == fill
    np.testing.assert_array_equal(ours(image), expected)


def bicubic_by_definition(image, out_h, out_w):
    """Antialiased bicubic resizing (Keys' kernel, a = -0.5, widened when shrinking) in float64."""

    def weights(n_in, n_out):
        scale = n_in / n_out
        width = max(scale, 1.0)
        matrix = np.zeros((n_out, n_in))
        for i in range(n_out):
            centre = (i + 0.5) * scale
            for j in range(max(0, math.floor(centre - 2 * width)), min(n_in, math.ceil(centre + 2 * width))):
                x = abs((j + 0.5 - centre) / width)
                if x < 1:
                    matrix[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
                elif x < 2:
                    matrix[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return matrix / matrix.sum(1, keepdims=True)

    return np.einsum(
        "ph,ow,hwc->poc", weights(image.shape[0], out_h), weights(image.shape[1], out_w), image, optimize=True
    )


@pytest.mark.parametrize("shape", [(30, 41), (41, 30), (64, 17), (7, 9)])
def test_independent_of_any_library(shape):
    """Equal to the definition in float64 but for two roundings (values far from 0 and 255: no clipping)."""
    image = picture(*shape) // 4 + 96
    stretched = bicubic_by_definition(image, 24, 24)
    assert np.abs(ImageProcessor.siglip(24)(image) - stretched).max() < 1.2
    padded = bicubic_by_definition(expand_to_square(image, (122, 116, 104)), 24, 24)
    assert np.abs(ImageProcessor.clip(24, aspect="pad")(image) - padded).max() < 1.2
    height, width = shape
    out_h, out_w = (24, int(24 * width / height)) if height <= width else (int(24 * height / width), 24)
    top, left = (out_h - 24) // 2, (out_w - 24) // 2
    cropped = bicubic_by_definition(image, out_h, out_w)[top : top + 24, left : left + 24]
    assert np.abs(ImageProcessor.clip(24)(image) - cropped).max() < 1.2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.booleans(), st.booleans(), st.integers(1, 40))
def test_equals_pillow(height, width, stretch, pad, size):
    image = picture(height, width, seed=height)
    ours = (ImageProcessor.siglip if stretch else ImageProcessor.clip)(size, "pad" if pad else "square")
    whole = expand_to_square(image, ours.fill) if pad else image
    h, w = whole.shape[:2]
    out = (int(size * w / h), size) if h <= w else (size, int(size * h / w))
    out = (size, size) if stretch else out
    resized = np.asarray(Image.fromarray(whole).resize(out, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    np.testing.assert_array_equal(ours(image), resized[top : top + size, left : left + size])
    np.testing.assert_array_equal(ours(Image.fromarray(image)), ours(image))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from(["bicubic", "bilinear"]),
)
def test_extreme_shapes_are_computed_as_others_are(height, width, pad, size, resample):
    """The way for extreme shapes, taken for ordinary ones, gives what Pillow gives."""
    image = picture(height, width, seed=height)
    ours = dataclasses.replace(ImageProcessor.clip(size, "pad" if pad else "square"), resample=resample)
    expected = ours(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "_WHOLE", 0)
        in_steps = ours(image)
    np.testing.assert_array_equal(in_steps, expected)


@pytest.mark.parametrize("shape", [(1, 65_000), (65_000, 1), (3, 100_000)])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_extreme_shapes_need_little_memory(shape, aspect):
    """LLaVA's pad would take 12.7 GB for the first; CLIP's resize to a side of 14 million pixels 9.8 GB."""
    image = np.full((*shape, 3), 200, np.uint8)
    tracemalloc.start()
    try:
        out = ImageProcessor.clip(224, aspect=aspect)(image)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e8
    expected = (122, 116, 104) if aspect == "pad" else (200, 200, 200)
    assert np.abs(np.median(out, axis=(0, 1)) - expected).max() <= 1
    assert (out == 200).all() == (aspect == "square")


def test_from_hf_config_clip_old_and_new_form():
    new = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": {"height": 336, "width": 336},
        "size": {"shortest_edge": 336},
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
    }
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 336, "size": 336, "resample": 3}
    expected = ImageProcessor(336, "crop", CLIP_MEAN, CLIP_STD, shortest_side=336)
    assert ImageProcessor.from_hf_config(new) == ImageProcessor.from_hf_config(old) == expected
    image = picture(40, 50)
    np.testing.assert_array_equal(expected(image), ImageProcessor.clip(336)(image))
    assert ImageProcessor.from_hf_config(new, aspect="pad").aspect == "pad"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("CLIP", {}),
        ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 2}),
        (
            "CLIP",
            {"size": {"height": 32, "width": 32}, "do_center_crop": False, "image_mean": [0.1, 0.2, 0.3]},
        ),
        ("Siglip", {"size": {"height": 48, "width": 48}}),
        ("Siglip", {"resample": 2}),
        ("Llava", {"do_pad": True, **CLIP_56}),
        ("Llava", {}),
    ],
)
def test_from_hf_config_equals_the_processor_it_describes(family, options):
    name = family.lower()
    module = pytest.importorskip(f"transformers.models.{name}.image_processing_pil_{name}")
    official = getattr(module, f"{family}ImageProcessorPil")(**options)
    ours = ImageProcessor.from_hf_config(official.to_dict())
    image = picture(61, 47)
    expected = np.moveaxis(official(Image.fromarray(image), return_tensors="np")["pixel_values"][0], 0, -1)
    np.testing.assert_allclose(ours.normalize(ours(image)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 4}, "resample"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"crop_size": {"height": 224, "width": 336}}, "crop_size"),
        ({"size": {"height": 224, "width": 336}}, "size"),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, "size"),
        ({"size": {"height": 256, "width": 256}}, "crop_size"),
        ({"size": {"shortest_edge": 200}}, "size"),
        ({"size": {}}, "size"),
        ({"crop_size": {"height": 224}}, "crop_size"),
    ],
)
def test_from_hf_config_refuses_what_it_cannot_reproduce(config, key):
    with pytest.raises(UnsupportedProcessorError, match=rf"^preprocessor config: {key}="):
        ImageProcessor.from_hf_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resample", [1]),
        ("resample", "bicubic"),
        ("size", {"shortest_edge": "x"}),
        ("size", {"shortest_edge": 0}),
        ("size", None),
        ("size", [224]),
        ("size", True),
        ("crop_size", {"height": "x", "width": "x"}),
        ("crop_size", "x"),
        ("crop_size", 10**400),
        ("rescale_factor", "x"),
        ("image_mean", 0.5),
        ("image_std", [0.5, 0.5, "x"]),
    ],
)
def test_from_hf_config_names_what_is_malformed(key, value):
    with pytest.raises(ValueError, match=rf"^preprocessor config: {key}") as caught:
        ImageProcessor.from_hf_config({key: value})
    assert not isinstance(caught.value, UnsupportedProcessorError)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"aspect": "padd"}, "aspect"),
        ({"geometry": "center"}, "geometry"),
        ({"resample": "cubic"}, "resample"),
        ({"size": 0}, "size"),
        ({"shortest_side": 20}, "shortest_side"),
    ],
)
def test_wrong_settings_are_named(options, key):
    settings = {"size": 24, "geometry": "crop", "mean": CLIP_MEAN, "std": CLIP_STD, **options}
    with pytest.raises(ValueError, match=f"image processor: {key}="):
        ImageProcessor(**settings)


def test_the_oracles_are_there_with_the_pinned_transformers():
    """The parity tests above skip where transformers has no Pillow processors; not with 5.23 and later."""
    transformers = importlib.import_module("transformers")
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if (major, minor) >= (5, 23):
        for name in ("clip", "siglip", "llava"):
            importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")


PIXELS = {
    ("siglip", "bicubic"): "04fbc3383a7b1ae7",
    ("siglip", "bilinear"): "c68df260b65ae5c5",
    ("clip", "bicubic"): "5764d0ddcc7505e8",
    ("clip", "bilinear"): "3f83fe2fd34aa4f2",
}


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("make", [ImageProcessor.siglip, ImageProcessor.clip])
def test_pixels_do_not_depend_on_the_version_of_pillow(make, resample):
    """Computed with Pillow 12.1 and with 13.0; direct resizing gives other pixels in 12 (or 13) for most shapes."""
    digest = hashlib.sha256()
    for height, width in ((300, 20), (20, 300), (97, 61), (400, 150), (64, 64), (90, 30)):
        processor = dataclasses.replace(make(24), resample=resample)
        digest.update(
            processor(np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)).tobytes()
        )
    assert digest.hexdigest()[:16] == PIXELS[make.__name__, resample]
