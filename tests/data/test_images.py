"""Decoding: what a viewer shows, what LLaVA does, and files that are not what they seem."""

import functools
import io
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from mllm_jax.data import images
from mllm_jax.data.images import ImageError, decode_image, open_rgb

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
DEEP_SHOWN = np.rint(DEEP / 257).astype(int)[..., None].repeat(3, 2)

# How stored pixels must be moved to be displayed, written from the EXIF standard's table of orientations
# (1: row 0 is the top and column 0 the left side; 6: row 0 is the right side, column 0 the top; ...).
DISPLAYED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def encode(image, form, **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decode(data, **options):
    """As an array and as an image of Pillow, which must agree."""
    found = decode_image(data, source="picture", **options)
    image = open_rgb(data, source="picture", **options)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), found)
    assert images.image_size(data, source="picture", **options) == found.shape[:2]
    return found


def bare(data):
    """What LLaVA's loader computes, by its definition."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def over_white(rgb, alpha):
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def palette_image(transparency=None) -> bytes:
    image = Image.fromarray(GREY // 64).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return encode(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


PALETTE = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    data = encode(COLOUR, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    stored = bare(data)
    if form != "JPEG":
        np.testing.assert_array_equal(stored, COLOUR)
    np.testing.assert_array_equal(decode(data), DISPLAYED[orientation](stored))
    np.testing.assert_array_equal(decode(data, compat="llava"), stored)


def test_tiff_orientation():
    data = encode(COLOUR, "TIFF", tiffinfo={images.ORIENTATION: 6})
    np.testing.assert_array_equal(decode(data), DISPLAYED[6](COLOUR))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(encode(COLOUR, "PNG"), COLOUR, id="rgb png"),
        pytest.param(encode(COLOUR, "BMP"), COLOUR, id="rgb bmp"),
        pytest.param(encode(COLOUR, "PPM"), COLOUR, id="rgb ppm"),
        pytest.param(encode(COLOUR, "TIFF", compression="tiff_lzw"), COLOUR, id="rgb tiff"),
        pytest.param(encode(GREY, "PNG"), GREY[..., None].repeat(3, 2), id="grey"),
        pytest.param(encode(GREY > 99, "PNG"), 255 * (GREY > 99)[..., None].repeat(3, 2), id="1 bit"),
        pytest.param(palette_image(), PALETTE[GREY // 64], id="palette"),
        pytest.param(
            palette_image(transparency=2),
            np.where((GREY // 64 == 2)[..., None], 255, PALETTE[GREY // 64]),
            id="palette, one index transparent",
        ),
        pytest.param(
            palette_image(transparency=bytes([0, 255, 51, 255])),
            over_white(PALETTE[GREY // 64], np.array([0, 255, 51, 255])[GREY // 64]),
            id="palette with alpha",
        ),
        pytest.param(encode(np.dstack([COLOUR, ALPHA]), "PNG"), over_white(COLOUR, ALPHA), id="rgba"),
        pytest.param(
            encode(np.dstack([GREY, ALPHA]), "PNG"),
            over_white(GREY[..., None].repeat(3, 2), ALPHA),
            id="grey and alpha",
        ),
        pytest.param(
            encode(GREY // 64 * 64, "PNG", transparency=64),
            np.where(GREY // 64 == 1, 255, GREY // 64 * 64)[..., None].repeat(3, 2),
            id="grey with a transparent value",
        ),
        pytest.param(
            encode(COLOUR, "PNG", transparency=tuple(map(int, COLOUR[2, 3]))),
            np.where((COLOUR[2, 3] == COLOUR).all(-1, keepdims=True), 255, COLOUR),
            id="rgb with a transparent colour",
        ),
        pytest.param(encode(DEEP, "PNG"), DEEP_SHOWN, id="16 bit png"),
        pytest.param(encode(DEEP, "TIFF"), DEEP_SHOWN, id="16 bit tiff"),
        pytest.param(
            encode(Image.frombytes("I;16B", (7, 5), DEEP.astype(">u2").tobytes()), "TIFF"),
            DEEP_SHOWN,
            id="16 bit tiff, big-endian",
        ),
        pytest.param(
            b"P5 7 5 65535\n" + DEEP.astype(">u2").tobytes(),
            DEEP_SHOWN,
            id="16 bit pgm",
        ),
        pytest.param(encode(COLOUR[:1], "PNG"), COLOUR[:1], id="1 pixel high"),
        pytest.param(encode(COLOUR[:, :1], "PNG"), COLOUR[:, :1], id="1 pixel wide"),
        pytest.param(
            encode(COLOUR, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOUR)]),
            COLOUR,
            id="animated png",
        ),
        pytest.param(
            encode(
                COLOUR, "WEBP", save_all=True, append_images=[Image.fromarray(255 - COLOUR)], lossless=True
            ),
            COLOUR,
            id="animated webp",
        ),
        pytest.param(
            encode(GREY, "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)]),
            GREY[..., None].repeat(3, 2),
            id="animated gif",
        ),
    ],
)
def test_shown_as_by_a_viewer(data, expected):
    decoded = decode(data)
    assert decoded.dtype == np.uint8
    assert decoded.shape == expected.shape
    # Integers are exact; blending with white may be rounded either way.
    np.testing.assert_allclose(decoded, expected, atol=1.0 if "float" in str(expected.dtype) else 0)
    np.testing.assert_array_equal(decode(data, compat="llava"), bare(data))


def test_16_bits_keep_their_range_and_llava_clips_them():
    ramp = np.array([[0, 128, 129, 257 * 7, 65535]], np.uint16)
    data = encode(ramp, "PNG")
    assert decode(data)[0, :, 0].tolist() == [0, 0, 1, 7, 255]
    assert decode(data, compat="llava")[0, :, 0].tolist() == [0, 128, 129, 255, 255]


def test_16_bit_transparent_value_is_white():
    values = np.array([[0, 1000, 65535]], np.uint16)
    plain = encode(values, "PNG")
    # A tRNS chunk goes before the pixels (IDAT) of a grey PNG and holds the transparent value.
    chunk = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = plain.index(b"IDAT") - 4
    assert decode(plain[:at] + chunk + plain[at:])[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(form):
    inks = np.zeros((8, 24, 4), np.uint8)
    inks[:, 8:16] = (0, 255, 255, 0)  # no cyan: red
    inks[:, 16:] = (0, 0, 0, 255)
    data = encode(Image.fromarray(inks, "CMYK"), form, **({"quality": 100} if form == "JPEG" else {}))
    decoded = decode(data)
    shown = [decoded[4, column].tolist() for column in (4, 12, 20)]
    np.testing.assert_allclose(shown, [[255] * 3, [255, 0, 0], [0] * 3], atol=2)


def test_jpeg_equals_pillow():
    data = encode(COLOUR, "JPEG", quality=90)
    np.testing.assert_array_equal(decode(data), bare(data))


def test_alpha_dropped_only_for_llava():
    hidden = np.zeros((2, 2, 4), np.uint8)
    hidden[..., 0] = 200  # red behind full transparency
    data = encode(hidden, "PNG")
    assert (decode(data) == 255).all()
    assert (decode(data, compat="llava") == [200, 0, 0]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"{'not': 'an image'}" * 9, "not an image in a supported format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in a supported format"),
        (encode(COLOUR, "EPS"), "not an image in a supported format"),  # would start Ghostscript
        (encode(COLOUR, "PNG")[:20], "truncated"),
        (encode(COLOUR, "JPEG")[:15], "truncated"),
    ],
)
@pytest.mark.parametrize("compat", [None, "llava"])
def test_unusable_data_names_the_source(data, message, compat):
    with pytest.raises(ImageError, match=message) as error:
        decode_image(data, source="photos/7.png", compat=compat)
    assert str(error.value).startswith("photos/7.png: ")


def test_pixels_without_a_brightness_range():
    data = encode(np.full((3, 3), 7.0, np.float32), "TIFF")
    with pytest.raises(ImageError, match=r"picture: .* no agreed brightness range"):
        decode(data)
    assert (decode(data, compat="llava") == 7).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_files(form):
    noise = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encode(noise, form)
    for share in (0.1, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"^picture: "):
            decode(data[: int(share * len(data))])


def png_header(width, height) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 8) + b"IDAT" + b"\x00" * 12


@pytest.mark.parametrize("side", [13_400, 19_000, 60_000])
def test_bombs_are_refused_from_the_header(side):
    # Pillow alone would fail with an error of its own, without the file's name.
    message = rf"{side * side} pixels exceed the limit of {images.MAX_PIXELS}; .*data\.max_image_pixels"
    with pytest.raises(ImageError, match=message):
        decode(png_header(side, side))


def test_the_pixel_limit_is_the_callers():
    data = encode(COLOUR, "PNG")
    assert decode(data, max_pixels=35).shape == COLOUR.shape
    with pytest.raises(ImageError, match="7 x 5 = 35 pixels exceed the limit of 34"):
        decode(data, max_pixels=34)
    with pytest.raises(ImageError, match="damaged or truncated PNG"):  # beyond Pillow's own limit: it is read
        decode(png_header(20_000, 10_000), max_pixels=10**9)


def test_overlong_sides_are_refused():
    with pytest.raises(ImageError, match="no side may be longer"):
        decode(png_header(images.MAX_SIDE + 1, 1))


def test_damaged_metadata_is_ignored_without_a_warning():
    data = encode(COLOUR, "JPEG")
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00"  # one entry: orientation, 65535 letters, not there
    exif += b"\x12\x01\x02\x00\xff\xff\x00\x00\xff\xff\xff\x7f"
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    damaged = data[:2] + segment + data[2:]
    with warnings.catch_warnings():  # pytest's own filters hide the one that the module sets
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="larger than file"):
            Image.open(io.BytesIO(damaged)).getexif()
        warnings.filterwarnings("ignore", category=UserWarning, module=images._METADATA)
        np.testing.assert_array_equal(decode(damaged), bare(data))


def test_unknown_compat():
    with pytest.raises(ValueError, match="'llava'"):
        decode_image(encode(COLOUR, "PNG"), source="x", compat="lava")


def test_threads_and_globals():
    files = [encode(COLOUR + np.uint8(i), "PNG") for i in range(40)]
    before = (Image.MAX_IMAGE_PIXELS, list(warnings.filters), Image.ID.copy())
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(decode, files))
    for i, image in enumerate(decoded):
        np.testing.assert_array_equal(image, COLOUR + np.uint8(i))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters), Image.ID) == before


FILES = [
    encode(COLOUR, "PNG"),
    encode(COLOUR, "JPEG"),
    encode(GREY, "GIF"),
    encode(COLOUR, "WEBP"),
    encode(COLOUR, "BMP"),
    encode(COLOUR, "TIFF", compression="tiff_lzw"),
    encode(COLOUR, "PPM"),
    encode(COLOUR, "JPEG2000"),
    palette_image(transparency=2),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_damaged_files_give_pixels_or_an_image_error(data, choose):
    """Whatever happens to the bytes, the only exception is ours."""
    damaged = bytearray(data)
    for _ in range(choose.draw(st.integers(1, 4))):
        damaged[choose.draw(st.integers(0, len(damaged) - 1))] = choose.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UserWarning, module=images._METADATA)
        outcome = attempt(bytes(damaged))
    if isinstance(outcome, ImageError):
        assert str(outcome).startswith("picture: ")
    else:
        assert outcome.dtype == np.uint8
        assert outcome.ndim == 3


def attempt(data):
    try:
        return decode(data, max_pixels=10_000)
    except ImageError as error:
        return error


def with_chunk(data: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG file with one more chunk before its pixels."""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk + data[at:]


LONG = bytes(70 << 20)  # of one byte: packs to 70 kB


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"tEXt", b"parameters\0" + LONG),
        (b"zTXt", b"parameters\0\0" + zlib.compress(LONG)),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)),
        (b"iCCP", b"scanner\0\0" + zlib.compress(LONG)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
    ],
)
def test_large_texts_and_profiles_are_not_damage(kind, body):
    data = with_chunk(encode(COLOUR, "PNG"), kind, body)
    if kind != b"tEXt":  # the other chunks are what Pillow alone refuses
        with pytest.raises(ValueError, match="too large"):
            Image.open(io.BytesIO(data)).load()
    for compat in (None, "llava"):
        tracemalloc.start()
        np.testing.assert_array_equal(decode(data, compat=compat), COLOUR)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + (8 << 20)
        tracemalloc.stop()


def test_an_orientation_in_a_png_text_is_kept():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for body in (
        b"XML:com.adobe.xmp\0\0\0\0\0" + xmp,
        b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp),
    ):
        data = with_chunk(encode(COLOUR, "PNG"), b"iTXt", body)
        np.testing.assert_array_equal(decode(data), DISPLAYED[6](COLOUR))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_size_is_read_without_decoding(form, monkeypatch):
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    plain, turned = encode(COLOUR, form), encode(COLOUR, "JPEG", exif=exif)
    kind = type(Image.open(io.BytesIO(plain)))
    monkeypatch.setattr(kind, "load", lambda _: pytest.fail("decoded"))
    assert images.image_size(plain, source="x") == (5, 7)
    assert images.image_size(turned, source="x") == (7, 5)
    assert images.image_size(turned, source="x", compat="llava") == (5, 7)
    with pytest.raises(ImageError, match="35 pixels exceed the limit of 34"):
        images.image_size(plain, source="x", max_pixels=34)


@pytest.mark.parametrize("compat", [None, "llava"])
def test_images_of_many_strips_equal_those_of_one(compat, monkeypatch):
    whole = [decode(data, compat=compat) for data in FILES]
    exif = Image.Exif()
    exif[images.ORIENTATION] = 7
    more = [
        encode(np.dstack([COLOUR, ALPHA]), "PNG", exif=exif),
        encode(DEEP, "PNG"),
        palette_image(bytes([0, 255, 51, 255])),
    ]
    whole += [decode(data, compat=compat) for data in more]
    monkeypatch.setattr(images, "_STRIP", 14)  # two rows
    for data, expected in zip([*FILES, *more], whole, strict=True):
        np.testing.assert_array_equal(decode(data, compat=compat), expected)


@pytest.mark.slow
def test_memory_of_a_large_palette_image_with_transparency():
    """Composed whole, 100 million pixels took 13 bytes each; here the palette's byte and the result's three."""
    image = Image.new("P", (10_000, 10_000))
    image.putpalette([10, 20, 30])
    data = encode(image, "PNG", transparency=bytes([51]), compress_level=1)
    assert len(data) < 1 << 20
    script = (
        "import sys; from mllm_jax.data.images import decode_image\n"
        # In KB, of this program alone: ru_maxrss begins with what the process that started it had.
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "found = decode_image(sys.stdin.buffer.read(), source='x')\n"
        "assert found.shape == (10_000, 10_000, 3) and (found[::999, ::999] == [206, 208, 210]).all()\n"
        "print(peak() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert int(ran.stdout) * 1024 < 5 * 10**8


def test_threads_wait_for_memory(monkeypatch):
    data = [encode(np.zeros((100, 100, 3), np.uint8), "PNG")] * 12  # 80,000 bytes each
    decode_bytes = functools.partial(decode_image, source="picture")
    monkeypatch.setenv("MLLM_JAX_MAX_DECODING_BYTES", "160000")
    running, most = [], []

    def load(image, *_):
        running.append(id(image))
        most.append(len(running))
        time.sleep(0.01)
        running.remove(id(image))
        return original(image)

    original = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", load)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(decode_bytes, data))
    assert max(most) == 2
    monkeypatch.setenv("MLLM_JAX_MAX_DECODING_BYTES", "1")  # less than one image takes: one at a time
    with ThreadPoolExecutor(6) as pool:
        most.clear()
        list(pool.map(decode_bytes, data))
    assert max(most) == 1
