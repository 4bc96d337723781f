"""From what a person types, images, videos and words, to requests that the model is asked with."""

import io
import os
import pathlib
import re
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import IMAGE, VIDEO, SampleError, Turn, render
from mllm_jax.data.images import ImageError, decode_image
from mllm_jax.data.layout import Shown, VisualLayout, layouts
from mllm_jax.data.tiles import slot_images
from mllm_jax.data.tokens import EncodedSample, encode_prompt, encode_sample
from mllm_jax.data.video import OpenVideo, open_video
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


def human_turn(prompt: str, images: int, videos: int = 0, *, sample: str = "?") -> tuple[Turn, list[str]]:
    """A question about images and videos, and which of these stand in it, as `IMAGE` and `VIDEO` in their order.

    Each stands where the words say `<image>` or `<video>` (for videos alone both are the same); else all come first, on
    lines of their own, images before videos. Where there are no videos, `<video>` is a word like any other.

    Raises:
      SampleError: more or fewer places than images and videos.
    """
    places = re.findall(f"{IMAGE}|{VIDEO}" if videos else IMAGE, prompt)
    if not places:
        return Turn("human", (*[""] * (images + videos), f"\n{prompt}" if images + videos else prompt)), [
            *[IMAGE] * images,
            *[VIDEO] * videos,
        ]
    shown = [VIDEO] * len(places) if not images and videos else places
    if (shown.count(IMAGE), shown.count(VIDEO)) != (images, videos):
        found = " and ".join(f"{places.count(tag)} {tag}" for tag in dict.fromkeys(places))
        given = f"{images} image(s)" + f" and {videos} video(s)" * bool(videos)
        raise SampleError(sample, f"the prompt has {found} place(s) for {given}")
    return Turn("human", tuple(re.split("|".join(dict.fromkeys(places)), prompt))), shown


def conversation(
    asked: Sequence[tuple[str, int, int]], said: Sequence[str], system: str | None, *, sample: str = "?"
) -> tuple[list[Turn], list[str]]:
    """The turns of a conversation that ends with a question, and its images and videos as `IMAGE` and `VIDEO`.

    Args:
      asked: the words of each question, and how many images and videos it shows.
      said: the answers between them.
      system: a system text in place of the template's own; None = the template's.

    Raises:
      SampleError: as `human_turn`.
    """
    turns = [] if system is None else [Turn("system", (system,))]
    shown: list[str] = []
    for index, (words, images, videos) in enumerate(asked):
        turn, own = human_turn(words, images, videos, sample=sample)
        turns += [turn, *(Turn("gpt", (answer,)) for answer in said[index : index + 1])]
        shown += own
    return turns, shown


def encode_conversation(
    model: Any,
    turns: Sequence[Turn],
    found: Sequence[VisualLayout],
    answer: str | None = None,
    *,
    sample: str = "?",
) -> EncodedSample:
    """Turns in a model's template as its input, up to where it answers, or with an answer as in training.

    Args:
      model: an `inference.model.Model`.
      found: the layout of each image and video.

    Raises:
      SampleError: the template has no place for these turns.
    """
    template = resolve_template(model.template, model.tokenizer)
    if answer is None:
        return encode_prompt(template, turns, model.tokenizer, found, sample=sample)
    spans = render(template, [*turns, Turn("gpt", (answer,))], sample=sample)
    return encode_sample(spans, model.tokenizer, found, sample=sample)


class Prompts:
    """Prompts with their images and videos, as requests to a model.

    Args:
      model: an `inference.model.Model`.
      images: of each prompt: one image, a list of several, or None. For one prompt its image or images.
      prompts: one, or a list of several.
      videos: of each prompt: one video, a list of several, or None. For one prompt its video or videos. A list of
        images is one video.
      history: of one prompt: earlier questions with their answers; its images and videos belong to the first question.
      system: a system text in place of the template's own; None = the template's.

    Attributes:
      single: whether it was one prompt and not a list.
      texts: the prompts as a list.

    Raises:
      ValueError: the lists have different lengths, or several prompts have a history.
    """

    def __init__(
        self,
        model: Any,
        images: Any,
        prompts: str | Sequence[str],
        videos: Any = None,
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
    ):
        self.model = model
        self.single = isinstance(prompts, str)
        self.texts = [prompts] if self.single else list(prompts)
        if history and not self.single:
            raise ValueError("a history is of one prompt; ask several conversations one after the other")
        self._history, self._system = history, system
        self._images: dict[Hashable, Any] = {}
        self._videos: dict[Hashable, Any] = {}
        self._opened: dict[Hashable, OpenVideo] = {}  # counting frames reads a file
        count = len(self.texts)
        own_images = [images] * count if self.single or not isinstance(images, list | tuple) else images
        one = self.single or _is_video(videos) or not isinstance(videos, list | tuple)
        own_videos = [videos] * count if one else videos
        for what, own in (("images", own_images), ("videos", own_videos)):
            if len(own) != count:
                raise ValueError(f"{count} prompts, but {what} for {len(own)}")
        self._keys = [[self._key(self._images, each) for each in _as_list(own)] for own in own_images]
        self._video_keys = [[self._key(self._videos, each) for each in _as_videos(own)] for own in own_videos]

    @staticmethod
    def _key(kept: dict[Hashable, Any], what: Any) -> Hashable:
        """Equal for the same image or video; it is kept, so that no other gets its id."""
        key = str(what) if isinstance(what, str | os.PathLike) else id(what)
        kept[key] = what
        return key

    def _rgb(self, key: Hashable) -> Rgb:
        image = self._images[key]
        where = f"image {list(self._images).index(key)}"
        return rgb(image, source=where, compat=self.model.compat, max_pixels=self.model.max_image_pixels)

    def _video(self, key: Hashable) -> OpenVideo:
        if key not in self._opened:
            self._opened[key] = open_video(self._videos[key])
        return self._opened[key]

    def load_image(self, key: tuple[str, Hashable], layout: VisualLayout) -> UInt8[np.ndarray, "n H W 3"]:
        """An image or video as the model takes it."""
        kind, which = key
        if kind == IMAGE:
            return slot_images(self.model.processor, self._rgb(which), layout)
        return self.model.frames(self._video(which))

    def request(self, index: int, answer: str | None = None) -> Request:
        """The request of one prompt, with an answer whose likelihood is asked for if one is given.

        Raises:
          SampleError: the prompt's places are not those of its images and videos.
          ImageError: a video that cannot be used, or an image where its size matters.
        """
        name, model = str(index), self.model
        images, videos = self._keys[index], self._video_keys[index]
        said = [answer for _, answer in self._history]
        first, *later = [*(question for question, _ in self._history), self.texts[index]]
        asked = [(first, len(images), len(videos)), *((question, 0, 0) for question in later)]
        turns, shown = conversation(asked, said, self._system, sample=name)
        left = {IMAGE: iter(images), VIDEO: iter(videos)}
        keys = tuple((kind, next(left[kind])) for kind in shown)
        found = layouts(model.config.visual_layout, [self._shown(key) for key in keys], sample=name)
        return Request(name, encode_conversation(model, turns, found, answer, sample=name), keys)

    def _shown(self, key: tuple[str, Hashable]) -> Shown:
        kind, which = key
        if kind == VIDEO:
            return self._video(which).total

        def read_size() -> tuple[int, int]:
            height, width = self._rgb(which).shape[:2]
            return height, width

        return read_size


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _is_video(given: Any) -> bool:
    """Whether this is one video: a path, an array or a list of images."""
    if isinstance(given, list | tuple):
        return bool(given) and all(
            isinstance(each, Image.Image) or (isinstance(each, np.ndarray) and each.ndim == 3)
            for each in given
        )
    return given is not None


def _as_videos(given: Any) -> list[Any]:
    return [given] if _is_video(given) else list(given or ())
