"""Encoded image files to RGB arrays, as an image viewer would show them.

Only bitmap formats are opened. Pillow knows more, among them formats whose decoding runs other programs
(Encapsulated PostScript starts Ghostscript); those are refused here. ICC colour profiles are not applied.
"""

import contextlib
import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import PIL
from jaxtyping import UInt8
from PIL import Image, features

from mllm_jax import limits
from mllm_jax.data.png_chunks import may_be_turned, without_text

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_SUFFIXES = {f: f".{f.lower()}" for f in FORMATS} | {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "DIB": ".bmp",
    "JPEG2000": ".jp2",
}
MAX_PIXELS = 178_956_970  # where Pillow refuses decompression bombs: 512 MiB of RGB; as data.max_image_pixels
MAX_SIDE = 1 << 18  # keeps the intermediate rows of resizing a one-pixel-high image below a gigabyte
ORIENTATION = 0x0112  # the EXIF tag
_STRIP = 1 << 20  # pixels that are converted at once
# Bytes a pixel that decoding takes: Pillow's image (some decoders have a buffer of their own, too) and the result.
_PER_PIXEL = {"WEBP": 16, "AVIF": 16, "JPEG2000": 16, "TIFF": 16}
_PER_PIXEL_ELSE = 8

# Damaged metadata is common in collections from the web and does not concern the pixels. Set once, on import:
# filters cannot be changed for a single call without changing them for all threads.
_METADATA = r"PIL\.(Tiff|Jpeg|Png|Mpo)ImagePlugin"
warnings.filterwarnings("ignore", category=UserWarning, module=_METADATA)

Image.init()  # registers the decoders, so that no call has to

# How the stored pixels of each EXIF orientation are shown.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


class ImageError(ValueError):
    """An image that cannot be used; the message names the file or sample."""


def decode_image(
    data: bytes,
    *,
    source: str,
    compat: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image file.

    The image is what a viewer shows: turned upright by its EXIF orientation, transparency over white,
    16-bit brightness scaled to 8 bits, the first frame of an animation. ``compat="llava"`` instead does what
    LLaVA's loader does (Pillow's bare ``convert("RGB")``): orientation ignored, alpha dropped (hidden
    colours show), 16-bit values clipped, so that nearly everything is white.

    Safe to call from several threads; they wait for each other where their images together would take more than the
    limit `MAX_DECODING_BYTES`.

    Args:
        data: the file's bytes.
        source: file or sample to name in errors.
        compat: None or "llava".
        max_pixels: larger images are refused from their header, before any pixel is decoded.

    Raises:
        ImageError: empty, truncated or damaged data, no image or an unsupported kind, or more than
            ``max_pixels``.
    """
    with _loaded(data, source, compat, max_pixels) as image:
        return _pixels(image, source, compat)


def open_rgb(
    data: bytes,
    *,
    source: str,
    compat: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """What `decode_image` decodes, as an image of Pillow in mode RGB: for resizing, an array would be copied twice.

    Args and raises: as `decode_image`.
    """
    with _loaded(data, source, compat, max_pixels) as image:
        plain = image.mode == "RGB" and (
            compat == "llava" or not (image.has_transparency_data or _orientation(image) in _UPRIGHT)
        )
        return image if plain else Image.fromarray(_pixels(image, source, compat))


def image_size(
    data: bytes,
    *,
    source: str,
    compat: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Height and width of what `decode_image` decodes, from the file's header.

    Args: as `decode_image`.

    Raises:
        ImageError: as `decode_image`; damaged pixels are not seen.
    """
    image = _header(data, source, compat, max_pixels)
    width, height = image.size
    # Pillow turns a TIFF itself, with compat too, and decodes a PNG to find what stands behind its pixels.
    asked = compat is None and image.format != "TIFF" and (image.format != "PNG" or may_be_turned(data))
    lies = asked and _orientation(image) in (5, 6, 7, 8)
    return (width, height) if lies else (height, width)


def image_suffix(data: bytes, *, source: str) -> str:
    """The ending of a file with these contents, such as ".jpg", whatever it was called.

    Raises:
        ImageError: as `decode_image`, of the header alone.
    """
    return _SUFFIXES.get(_open(data, source).format, "")


def _header(data: bytes, source: str, compat: str | None, max_pixels: int) -> Image.Image:
    """The image before its pixels are decoded, checked for its size."""
    if compat not in (None, "llava"):
        raise ValueError(f"unknown compat {compat!r}; None or 'llava'")
    image = _open(data, source)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{source}: the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"{source}: {width} x {height} = {width * height} pixels exceed the limit of {max_pixels}; "
            "shrink the image or raise data.max_image_pixels"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{source}: {width} x {height} pixels; no side may be longer than {MAX_SIDE}")
    return image


@contextlib.contextmanager
def _loaded(data: bytes, source: str, compat: str | None, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its stored pixels; what fails inside, too, is an ImageError."""
    image = _header(data, source, compat, max_pixels)
    width, height = image.size
    try:
        with _IN_FLIGHT.take(width * height * _PER_PIXEL.get(image.format, _PER_PIXEL_ELSE)):
            image.load()
            yield image
    except ImageError:
        raise
    except Exception as error:  # decoders raise many kinds on damaged data
        raise ImageError(f"{source}: damaged or truncated {image.format} image: {error}") from error


def _pixels(image: Image.Image, source: str, compat: str | None) -> UInt8[np.ndarray, "h w 3"]:
    if compat == "llava":
        image.info.pop("transparency", None)  # only spares Pillow's warning; the pixels stay the same
        return _in_strips(image, lambda strip: strip.convert("RGB"))
    rgb, orientation = _to_rgb(image, source), _orientation(image)
    return np.ascontiguousarray(_UPRIGHT[orientation](rgb)) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # unreadable metadata: viewers show the pixels as they are
        return None


class _Budget:
    """Bytes that threads take and give back; one that asks for too much waits, or is alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = 0

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        limit = limits.limit("MAX_DECODING_BYTES")
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + size <= limit)
            self._taken += size
        try:
            yield
        finally:
            with self._changed:
                self._taken -= size
                self._changed.notify_all()


_IN_FLIGHT = _Budget()


def decoder_versions() -> dict[str, str | None]:
    """What decodes pixels: the versions of Pillow and of the libraries that it decodes lossy formats with."""
    codecs = ("libjpeg_turbo", "webp", "jpg_2000", "avif", "libtiff")
    return {"pillow": PIL.__version__} | {codec: features.version(codec) for codec in codecs}


def _open(data: bytes, source: str) -> Image.Image:
    """Read the header. ``Image.open`` would warn or fail at its own, process-wide pixel limit."""
    if not data:
        raise ImageError(f"{source}: the image file is empty")
    failures = []
    for name in FORMATS:
        if name not in Image.OPEN:  # not compiled into this Pillow
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(data[:16])
        if accepted is not True:
            failures += [accepted] if accepted else []  # a message: the codec is missing
            continue
        try:
            return factory(io.BytesIO(without_text(data)), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            failures.append(f"{name}: {error}")
        except Exception as error:
            raise ImageError(f"{source}: damaged or truncated {name} image: {error}") from error
    if failures:
        raise ImageError(f"{source}: damaged or truncated image ({'; '.join(failures)})")
    raise ImageError(f"{source}: not an image in a supported format ({', '.join(FORMATS)})")


def _to_rgb(image: Image.Image, source: str) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _in_strips(image, _from_16_bits)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{source}: 32-bit or floating-point pixels have no agreed brightness range; "
            "save the image with 8 or 16 bits per channel"
        )
    return _in_strips(
        image, _over_white if image.has_transparency_data else lambda strip: strip.convert("RGB")
    )


def _in_strips(
    image: Image.Image, convert: Callable[[Image.Image], Image.Image]
) -> UInt8[np.ndarray, "h w 3"]:
    """A conversion of single pixels, done for a few rows at a time: conversions take several bytes a pixel."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return np.array(convert(image))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        pixels[top : top + rows] = convert(image.crop((0, top, width, min(top + rows, height))))
    return pixels


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")
