"""From what a person types, images and words, to requests that the model is asked with."""

import io
import os
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import IMAGE, SampleError, Turn, render
from mllm_jax.data.images import ImageError, decode_image
from mllm_jax.data.layout import VisualLayout, layouts
from mllm_jax.data.tiles import slot_images
from mllm_jax.data.tokens import encode_prompt, encode_sample
from mllm_jax.inference.batching import Request

Rgb = UInt8[np.ndarray, "h w 3"]


def rgb(image: Any, *, source: str, compat: str | None, max_pixels: int) -> Rgb:
    """Any form of an image as pixels.

    Args:
      image: a file's path or its bytes, a PIL image, or an array uint8[h, w, 3].
      source: what messages call it.
      compat, max_pixels: as in `data.images.decode_image`.

    Raises:
      ImageError: it cannot be used.
      FileNotFoundError: there is no such file.
      TypeError: something else.
    """
    if isinstance(image, str | os.PathLike):
        source, image = str(image), pathlib.Path(image).expanduser().read_bytes()
    elif isinstance(image, Image.Image):
        image = _as_png(image)
    if isinstance(image, bytes):
        return decode_image(image, source=source, compat=compat, max_pixels=max_pixels)
    if not hasattr(image, "__array__"):
        raise TypeError(
            f"{source} is a {type(image).__name__}; give a path, bytes, a PIL image or an array uint8[h, w, 3]"
        )
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ImageError(
            f"{source} is an array {pixels.dtype}{list(pixels.shape)}; an image is uint8[h, w, 3], RGB from 0 to 255"
        )
    return pixels


def _as_png(image: Image.Image) -> bytes:
    """A file of a PIL image, so that transparency, orientation and depth are treated as in any file."""
    buffer = io.BytesIO()
    exif = image.getexif()
    if image.mode not in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):  # what PNG holds
        image = image.convert("RGB")
    image.save(buffer, "PNG", exif=exif, compress_level=1)
    return buffer.getvalue()


def human_turn(prompt: str, images: int, *, sample: str = "?") -> Turn:
    """A question about images: each stands where the words say `<image>`; else all come first, on lines of their own.

    Raises:
      SampleError: more or fewer places than images.
    """
    parts = tuple(prompt.split(IMAGE))
    if len(parts) == images + 1:
        return Turn("human", parts)
    if len(parts) > 1:
        raise SampleError(sample, f"the prompt has {len(parts) - 1} {IMAGE} place(s) for {images} image(s)")
    return Turn("human", (*[""] * images, f"\n{prompt}"))


class Prompts:
    """Prompts with their images, as requests to a model.

    Args:
      model: an `inference.model.Model`.
      images: of each prompt: one image, a list of several, or None. For one prompt its image or images.
      prompts: one, or a list of several.

    Attributes:
      single: whether it was one prompt and not a list.
      texts: the prompts as a list.

    Raises:
      ValueError: the lists have different lengths.
    """

    def __init__(self, model: Any, images: Any, prompts: str | Sequence[str]):
        self.model = model
        self.single = isinstance(prompts, str)
        self.texts = [prompts] if self.single else list(prompts)
        if self.single or not isinstance(images, list | tuple):
            images = [images] * len(self.texts)  # one for all
        if len(images) != len(self.texts):
            raise ValueError(f"{len(self.texts)} prompts, but images for {len(images)}")
        self._images: dict[Hashable, Any] = {}
        self._keys = [tuple(map(self._key, _as_list(own))) for own in images]

    def _key(self, image: Any) -> Hashable:
        """Equal for the same image; the image is kept, so that no other gets its id."""
        key = str(image) if isinstance(image, str | os.PathLike) else id(image)
        self._images[key] = image
        return key

    def _rgb(self, key: Hashable) -> Rgb:
        image = self._images[key]
        where = f"image {list(self._images).index(key)}"
        return rgb(image, source=where, compat=self.model.compat, max_pixels=self.model.max_image_pixels)

    def load_image(self, key: Hashable, layout: VisualLayout) -> UInt8[np.ndarray, "n H W 3"]:
        """An image as the model takes it."""
        return slot_images(self.model.processor, self._rgb(key), layout)

    def request(self, index: int, answer: str | None = None) -> Request:
        """The request of one prompt, with an answer whose likelihood is asked for if one is given.

        Raises:
          SampleError: the prompt's places are not those of its images.
        """
        name, keys, model = str(index), self._keys[index], self.model
        template = resolve_template(model.template, model.tokenizer)
        turn = human_turn(self.texts[index], len(keys), sample=name)
        found = layouts(model.config.visual_layout, [self._size_of(key) for key in keys])
        if answer is None:
            sample = encode_prompt(template, [turn], model.tokenizer, found, sample=name)
        else:
            spans = render(template, [turn, Turn("gpt", (answer,))], sample=name)
            sample = encode_sample(spans, model.tokenizer, found, sample=name)
        return Request(name, sample, keys)

    def _size_of(self, key: Hashable) -> Callable[[], tuple[int, int]]:
        def read_size() -> tuple[int, int]:
            height, width = self._rgb(key).shape[:2]
            return height, width

        return read_size


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
