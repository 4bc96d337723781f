"""Slots as pixels: the whole image, a view of it and the tiles of a canvas (`anyres`), or the frames of a video."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mllm_jax.data.anyres import fitted
from mllm_jax.data.layout import VisualLayout
from mllm_jax.data.naflex import Processor
from mllm_jax.data.preprocessing import resized


def slot_images(
    processor: Processor, image: UInt8[np.ndarray, "h w 3"] | Image.Image, layout: VisualLayout
) -> UInt8[np.ndarray, "n H W 3"]:
    """The n slots of one image, each brought to what the vision encoder takes; values stay in 0..255.

    A canvas holds the image in its middle, in black. Every slot then goes through the processor, as in LLaVA-NeXT.

    Args:
        processor: makes images of the size of a slot; squares, where there is a canvas.
        image: an array, or an image of Pillow in mode RGB.
        layout: the image's.
    """
    if layout.canvas is None:
        return processor(image)[None]
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.ascontiguousarray(image))
    height, width = layout.canvas
    inside = resized(image, fitted((image.height, image.width), layout.canvas), processor.resample)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(inside, ((width - inside.width) // 2, (height - inside.height) // 2))
    side = processor.size
    boxes = [(x, y, x + side, y + side) for y in range(0, height, side) for x in range(0, width, side)]
    views = [canvas.crop(box) for box in boxes]
    if len(layout.slots) > len(views):
        whole = processor.shortest_side or side
        views.insert(0, resized(image, (whole, whole), processor.resample))
    square = dataclasses.replace(processor, aspect="square")
    return np.stack([square(view) for view in views])


def frame_slots(
    processor: Processor, frames: Sequence[UInt8[np.ndarray, "_ _ 3"] | Image.Image]
) -> UInt8[np.ndarray, "n H W 3"]:
    """The slots of a video, one frame in each; values stay in 0..255.

    Args:
        processor: as in `slot_images`.
        frames: arrays, or images of Pillow in mode RGB.
    """
    return np.stack([processor(frame) for frame in frames])
