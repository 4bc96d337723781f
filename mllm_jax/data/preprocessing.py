"""Decoded images to the square uint8 input of a vision tower, equal to the CLIP and SigLIP processors.

Resizing is Pillow's antialiased filter on uint8, as in the original pipelines, one axis after the other in an order of
our own, so that every version of Pillow gives the same pixels. Images of extreme aspect ratio go through
``resampling`` instead, with the same result.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from mllm_jax import limits
from mllm_jax.data.resampling import resample_rows

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHOLE = 1 << 27  # pixels of an intermediate image that is still made (512 MiB)

Triple = tuple[float, float, float]


class UnsupportedProcessorError(ValueError):
    """A sound ``preprocessor_config.json`` of a processor that cannot be reproduced exactly."""


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """How a vision tower wants its images.

    Example:
        >>> processor = ImageProcessor.clip(224, aspect="pad")
        >>> processor(np.zeros((30, 40, 3), np.uint8)).shape
        (224, 224, 3)

    Attributes:
        size: side of the square output in pixels.
        geometry: "crop" resizes the shortest side to ``shortest_side`` and takes the central square (CLIP);
            "stretch" resizes to the square whatever the aspect ratio (SigLIP).
        mean: per channel, for values in 0..1.
        std: per channel.
        aspect: "pad" first extends the image to a centred square filled with the mean colour (LLaVA's
            instruction tuning); "square" leaves everything to the geometry.
        shortest_side: for "crop"; 0 means ``size``.
        resample: "bicubic" or "bilinear".
    """

    size: int
    geometry: str
    mean: Triple
    std: Triple
    aspect: str = "square"
    shortest_side: int = 0
    resample: str = "bicubic"

    def __post_init__(self):
        for key, value, allowed in (
            ("geometry", self.geometry, ("crop", "stretch")),
            ("aspect", self.aspect, ("pad", "square")),
            ("resample", self.resample, tuple(_FILTERS)),
        ):
            if value not in allowed:
                raise ValueError(f"image processor: {key}={value!r} is not one of {allowed}")
        if self.size < 1:
            raise ValueError(f"image processor: size={self.size} must be positive")
        if self.shortest_side and (self.geometry != "crop" or self.shortest_side < self.size):
            raise ValueError(
                f"image processor: shortest_side={self.shortest_side} needs geometry 'crop' and must not be "
                f"below size={self.size}"
            )

    @classmethod
    def clip(cls, size: int, aspect: str = "square") -> "ImageProcessor":
        """The processor of OpenAI's CLIP models."""
        return cls(size, "crop", CLIP_MEAN, CLIP_STD, aspect)

    @classmethod
    def siglip(cls, size: int, aspect: str = "square") -> "ImageProcessor":
        """The processor of the SigLIP models."""
        return cls(size, "stretch", SIGLIP_MEAN, SIGLIP_STD, aspect)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], aspect: str | None = None) -> "ImageProcessor":
        """Read the contents of a ``preprocessor_config.json``.

        Args:
            config: of a CLIP, SigLIP or LLaVA image processor, old or new form.
            aspect: None takes "pad" if the config says ``do_pad``, else "square".

        Raises:
            UnsupportedProcessorError: a processor, or a setting, that cannot be reproduced exactly; names the key.
            ValueError: a value of the wrong type; names the key.
        """
        return _from_hf_config(config, aspect)

    def hf_config(self) -> dict[str, Any]:
        """The contents of a ``preprocessor_config.json``, from which `from_hf_config` makes this processor again.

        What it does not say is the aspect, which Hugging Face's processors have no setting for.
        """
        square = {"height": self.size, "width": self.size}
        kernel = int(_FILTERS[self.resample])
        fields = {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "rescale_factor": 1 / 255,
            "resample": kernel,
            "size": square,
        }
        if self.geometry == "crop":
            fields |= {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": self.shortest_side or self.size},
                "do_center_crop": True,
                "crop_size": square,
            }
        return fields

    def at_size(self, size: int) -> "ImageProcessor":
        """The same processor with an output of `size` pixels a side; the share that "crop" cuts away stays."""
        shortest = round(self.shortest_side * size / self.size) if self.shortest_side else 0
        return dataclasses.replace(self, size=size, shortest_side=shortest)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the output."""
        return (self.size, self.size)

    @property
    def fill(self) -> tuple[int, int, int]:
        """Colour of the padding: (122, 116, 104) for CLIP, 127 for SigLIP."""
        return mean_colour(self.mean)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"] | Image.Image) -> UInt8[np.ndarray, "size size 3"]:
        """Pad, resize and crop one image; values stay in 0..255.

        Args:
            image: an array, or an image of Pillow in mode RGB (`images.open_rgb`), which is faster.
        """
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.ascontiguousarray(image))
        width, height = image.size
        square = max(height, width) if self.aspect == "pad" else 0
        h, w = square or height, square or width
        if self.geometry == "stretch":
            out_h = out_w = self.size
        else:
            short = self.shortest_side or self.size
            out_h = short if h <= w else int(short * h / w)
            out_w = short if w <= h else int(short * w / h)
        if max(square * square, out_h * out_w) > _WHOLE:
            return self._in_steps(np.asarray(image), (h, w), (out_h, out_w))
        # An axis is padded just before it is resized: resized along the other axis, padding keeps its one colour.
        kernel = _FILTERS[self.resample]
        for axis in _axes((h, w), (out_h, out_w)):
            if axis == "width":
                image = self._padded(image, (w, image.height)).resize((out_w, image.height), kernel)
            else:
                image = self._padded(image, (image.width, h)).resize((image.width, out_h), kernel)
        left, top = (out_w - self.size) // 2, (out_h - self.size) // 2
        if (out_w, out_h) != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.array(image)

    def _padded(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The image in the middle of one of this width and height."""
        if image.size == size:
            return image
        padded = Image.new("RGB", size, self.fill)
        padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        return padded

    def _in_steps(
        self, image: UInt8[np.ndarray, "h w 3"], padded: tuple[int, int], resized: tuple[int, int]
    ) -> UInt8[np.ndarray, "size size 3"]:
        """The same without the intermediate images."""
        kept = {"fill": self.fill, "size": self.size, "kernel": self.resample}
        for axis in _axes(padded, resized):
            if axis == "width":
                image = resample_rows(image, padded=padded[1], resized=resized[1], **kept)
            else:
                rows = resample_rows(image.transpose(1, 0, 2), padded=padded[0], resized=resized[0], **kept)
                image = rows.transpose(1, 0, 2)
        return np.ascontiguousarray(image)

    def normalize(self, image: UInt8[np.ndarray, "*batch 3"]) -> Float32[np.ndarray, "*batch 3"]:
        """``(image / 255 - mean) / std``. The model does this on the device; here for tests and tools."""
        scaled = image.astype(np.float32) * np.float32(1 / 255)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def mean_colour(mean: Triple) -> tuple[int, int, int]:
    """A mean of 0..1 as a pixel, rounded down as in LLaVA."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def resized(image: Image.Image, size: tuple[int, int], resample: str) -> Image.Image:
    """An image brought to a height and width, its aspect ratio changed if need be.

    Args:
        image: in mode RGB.
        size: height and width.
        resample: "bicubic" or "bilinear".
    """
    height, width = size
    for axis in _axes((image.height, image.width), size):
        to = (width, image.height) if axis == "width" else (image.width, height)
        image = image.resize(to, _FILTERS[resample])
    return image


def _axes(before: tuple[int, int], after: tuple[int, int]) -> tuple[str, str]:
    """The order in which axes are resized: each rounds to uint8, so that it is seen in the pixels.

    Pillow up to 12 takes the width first. Pillow 13 takes the height first where that makes the intermediate image
    smaller, by the rule here; in long images that SigLIP stretches, the two differ by up to 10 grey levels.

    Args:
        before: height and width of the image.
        after: those of the resized one.
    """
    fewer_rows, fewer_columns = before[0] - after[0], before[1] - after[1]
    first = fewer_rows > 0 and fewer_rows > 2 * fewer_columns
    return ("height", "width") if first else ("width", "height")


_HF_TYPES = (
    "CLIPImageProcessor", "CLIPFeatureExtractor", "SiglipImageProcessor", "LlavaImageProcessor",
    "LlavaNextImageProcessor", "LlavaOnevisionImageProcessor",
)  # fmt: skip


def _from_hf_config(config: Mapping[str, Any], aspect: str | None) -> ImageProcessor:
    def refuse(key: str, why: str) -> ValueError:
        return UnsupportedProcessorError(f"preprocessor config: {key}={config.get(key)!r}: {why}")

    def malformed(key: str, wanted: str) -> ValueError:
        return ValueError(f"preprocessor config: {key}={config.get(key)!r} must be {wanted}")

    def three(key: str, default: Triple) -> Triple:
        values = config.get(key, default)
        if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise malformed(key, "three numbers")
        first, second, third = map(float, values)
        return first, second, third

    def sides(key: str, default: dict[str, int], whole: tuple[str, ...]) -> dict[str, int]:
        value = config.get(key, default)
        value = value if isinstance(value, dict) else dict.fromkeys(whole, value or 0)
        value = {name: side for name, side in value.items() if side is not None}
        for side in value.values():
            if type(side) is not int or side < 1:
                raise malformed(key, "a positive whole number, or an object of them")
            limits.check("MAX_IMAGE_SIDE", side, f"preprocessor config: {key}")
        return value

    key = "image_processor_type" if "image_processor_type" in config else "feature_extractor_type"
    kind = str(config.get(key, "CLIPImageProcessor")).removesuffix("Fast").removesuffix("Pil")
    if kind not in _HF_TYPES:
        raise refuse(key, f"only {', '.join(_HF_TYPES)} are known")
    siglip, onevision = kind == "SiglipImageProcessor", kind == "LlavaOnevisionImageProcessor"
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(key, True):
            raise refuse(key, "the vision towers need it")
    if not _is_number(factor := config.get("rescale_factor", 1 / 255)):
        raise malformed("rescale_factor", "a number")
    if not np.isclose(factor, 1 / 255):
        raise refuse("rescale_factor", "only 1/255 is supported")
    names = {int(value): name for name, value in _FILTERS.items()}
    kernel = config.get("resample", 3)
    if kernel is not None and not isinstance(kernel, int):
        raise malformed("resample", "a whole number, Pillow's number of a filter")
    if kernel not in names:
        raise refuse("resample", f"only {names} are supported")

    mean = three("image_mean", SIGLIP_MEAN if siglip else CLIP_MEAN)
    std = three("image_std", SIGLIP_STD if siglip else CLIP_STD)
    if aspect is None:
        pads = onevision or (config.get("do_pad", False) and kind == "LlavaImageProcessor")
        aspect = "pad" if pads else "square"
    common = {"mean": mean, "std": std, "aspect": aspect, "resample": names[kernel]}

    square = dict.fromkeys(("height", "width"), 384 if onevision else 224)
    size = sides("size", square if siglip or onevision else {"shortest_edge": 224}, ("shortest_edge",))
    do_crop = config.get("do_center_crop", not (siglip or onevision))
    crop = sides("crop_size", square, ("height", "width")) if do_crop else {}
    if do_crop and (set(crop) != {"height", "width"} or crop["height"] != crop["width"]):
        raise refuse("crop_size", "the input of a vision tower is square")
    if set(size) == {"shortest_edge"}:
        if not do_crop:
            raise refuse("do_center_crop", "with size.shortest_edge the image would not become square")
        if size["shortest_edge"] < crop["height"]:
            raise refuse("size", "a crop that is larger than the resized image is not supported")
        return ImageProcessor(crop["height"], "crop", shortest_side=size["shortest_edge"], **common)
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise refuse("size", "needs shortest_edge, or equal height and width")
    if do_crop and crop["height"] != size["height"]:
        raise refuse("crop_size", "a crop after resizing to a fixed size is not supported")
    return ImageProcessor(size["height"], "stretch", **common)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6
