"""Encoded image files to RGB arrays, as an image viewer would show them.

Only bitmap formats are opened. Pillow knows more, among them formats whose decoding runs other programs
(Encapsulated PostScript starts Ghostscript); those are refused here. ICC colour profiles are not applied.
"""

import io
import struct
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # where Pillow refuses decompression bombs: 512 MiB of RGB; as data.max_image_pixels
MAX_SIDE = 1 << 18  # keeps the intermediate rows of resizing a one-pixel-high image below a gigabyte
ORIENTATION = 0x0112  # the EXIF tag

# Damaged metadata is common in collections from the web and does not concern the pixels. Set once, on import:
# filters cannot be changed for a single call without changing them for all threads.
_METADATA = r"PIL\.(Tiff|Jpeg|Png|Mpo)ImagePlugin"
warnings.filterwarnings("ignore", category=UserWarning, module=_METADATA)

Image.init()  # registers the decoders, so that no call has to

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
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

    The picture is what a viewer shows: turned upright by its EXIF orientation, transparency over white,
    16-bit brightness scaled to 8 bits, the first frame of an animation. ``compat="llava"`` instead does what
    LLaVA's loader does (Pillow's bare ``convert("RGB")``): orientation ignored, alpha dropped (hidden
    colours show), 16-bit values clipped, so that nearly everything is white.

    Safe to call from several threads.

    Args:
        data: the file's bytes.
        source: file or sample to name in errors.
        compat: None or "llava".
        max_pixels: larger images are refused from their header, before any pixel is decoded.

    Raises:
        ImageError: empty, truncated or damaged data, no image or an unsupported kind, or more than
            ``max_pixels``.
    """
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
    try:
        image.load()
        if compat == "llava":
            image.info.pop("transparency", None)  # only spares Pillow's warning; the pixels stay the same
            return np.array(image.convert("RGB"))
        return _upright(_to_rgb(image, source), image)
    except ImageError:
        raise
    except Exception as error:  # decoders raise many kinds on damaged data
        raise ImageError(f"{source}: damaged or truncated {image.format} image: {error}") from error


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
            return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            failures.append(f"{name}: {error}")
        except Exception as error:
            raise ImageError(f"{source}: damaged or truncated {name} image: {error}") from error
    if failures:
        raise ImageError(f"{source}: damaged or truncated image ({'; '.join(failures)})")
    raise ImageError(f"{source}: not an image in a supported format ({', '.join(FORMATS)})")


def _to_rgb(image: Image.Image, source: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{source}: 32-bit or floating-point pixels have no agreed brightness range; "
            "save the image with 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _upright(rgb: Image.Image, original: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    try:
        orientation = original.getexif().get(ORIENTATION)
    except Exception:  # unreadable metadata: viewers show the pixels as they are
        orientation = None
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return np.array(rgb)
