"""Images at their own aspect ratio (SigLIP 2 NaFlex): as many patches as fit a limit, in a grid of the image's shape.

A slot holds its patches one beside the other, as an image of one patch's height: patch n of an image of `rows` x
`columns` patches is at row n // columns and column n % columns of it, and what is behind the last one is empty.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mllm_jax.data.batch import SELECT, Size
from mllm_jax.data.layout import Slot, VisualLayout
from mllm_jax.data.preprocessing import ImageProcessor, Triple, mean_colour, resized

Grid = tuple[int, int]  # rows, columns of patches

_EPS = 1e-5  # to which the scale of an image is found
_LARGEST = 100.0  # scale of an image that is tried


def native_grid(size: Size, patch: int, max_patches: int) -> Grid:
    """The patches of an image: those of the largest scale, aspect ratio kept, at which they are not more than allowed.

    >>> native_grid((480, 640), 16, 256)
    (14, 18)

    Args:
      size: its height and width.
      patch: pixels per patch side.
      max_patches: L.
    """

    def grid(scale: float) -> Grid:
        rows, columns = (max(1, math.ceil(side * scale / patch)) for side in size)
        return rows, columns

    low, high = _EPS / 10, _LARGEST
    while high - low >= _EPS:
        middle = (low + high) / 2
        if math.prod(grid(middle)) <= max_patches:
            low = middle
        else:
            high = middle
    return grid(low)


@dataclasses.dataclass(frozen=True)
class NaFlexProcessor:
    """How a NaFlex encoder wants its images, equal to transformers' Siglip2ImageProcessor.

    Attributes:
      patch: pixels per patch side.
      max_patches: L.
      mean: per channel, for values in 0..1; std: likewise.
    """

    patch: int
    max_patches: int
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    @classmethod
    def of(cls, model: Any) -> "NaFlexProcessor":
        """The one of a `ModelConfig` with `max_patches`."""
        return cls(model.vision.patch, model.max_patches, model.vision.mean, model.vision.std)

    @property
    def shape(self) -> Size:
        """Height and width of what it makes."""
        return (self.patch, self.patch * self.max_patches)

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean colour."""
        return mean_colour(self.mean)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"] | Image.Image) -> UInt8[np.ndarray, "p Lp 3"]:
        """The patches of one image, one beside the other; values stay in 0..255.

        Args:
          image: an array, or an image of Pillow in mode RGB.
        """
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.ascontiguousarray(image))
        rows, columns = native_grid((image.height, image.width), self.patch, self.max_patches)
        pixels = np.asarray(resized(image, (rows * self.patch, columns * self.patch), "bilinear"))
        patches = pixels.reshape(rows, self.patch, columns, self.patch, 3).transpose(1, 0, 2, 3, 4)
        strip = np.zeros((*self.shape, 3), np.uint8)
        strip[:, : rows * columns * self.patch] = patches.reshape(self.patch, -1, 3)
        return strip

    def hf_config(self) -> dict[str, Any]:
        """The contents of a `preprocessor_config.json`."""
        return {
            "image_processor_type": "Siglip2ImageProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "max_num_patches": self.max_patches,
            "patch_size": self.patch,
            "resample": int(Image.Resampling.BILINEAR),
            "rescale_factor": 1 / 255,
        }


Processor = ImageProcessor | NaFlexProcessor


@dataclasses.dataclass(frozen=True)
class NativeAspect:
    """The rule of images at their own aspect ratio: one slot, of whose tokens those of the image's patches are kept.

    >>> rule = NativeAspect(Slot(256, size=(16, 4096), native=True), patch=16)
    >>> rule(lambda: (480, 640)).num_tokens
    252

    Attributes:
      slot: of L tokens, one for each patch.
      patch: pixels per patch side.
    """

    slot: Slot
    patch: int
    combination = SELECT
    separated = False
    most_slots = 1

    @property
    def most_tokens(self) -> int:
        """No image has more patches."""
        return self.slot.num_tokens

    def __call__(self, read_size: Callable[[], Size], images: int = 1, /) -> VisualLayout:
        """The layout of one image; see `LayoutRule`."""
        return _layout(self, native_grid(read_size(), self.patch, self.slot.num_tokens))


@functools.lru_cache(maxsize=4096)
def _layout(rule: NativeAspect, grid: Grid) -> VisualLayout:
    return VisualLayout((rule.slot,), np.arange(math.prod(grid)), grid=grid)
