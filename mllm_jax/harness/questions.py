"""What a harness shows a model, as the turns of a conversation with their images and videos."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mllm_jax.data.conversations import IMAGE, VIDEO, SampleError, Turn
from mllm_jax.data.layout import Shown, VisualLayout
from mllm_jax.data.tiles import slot_images
from mllm_jax.data.video import OpenVideo, Segment, open_video
from mllm_jax.inference.model import Model
from mllm_jax.inference.prompts import human_turn, rgb

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SOUND_FILES = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")


@dataclasses.dataclass(frozen=True, eq=False)
class Medium:
    """An image or a video.

    Attributes:
      kind: `IMAGE` or `VIDEO`.
      source: as `inference.prompts.rgb` or `data.video.open_video` takes it.
      segment: of a video: only this part.
    """

    kind: str
    source: Any
    segment: Segment | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """What a model is shown.

    Attributes:
      turns: with a place for each of `media`, in their order.
      media: images and videos.
    """

    turns: tuple[Turn, ...]
    media: tuple[Medium, ...]


def from_context(text: str, visuals: Sequence[Any] | None, *, sample: str) -> Conversation:
    """A question as a harness's simple models are asked.

    Images and videos stand where the text has as many marks (`<image>`; also `<video>`) as there are; else they come
    first, each on a line of its own, and marks in the text are words.

    Args:
      visuals: PIL images, arrays, paths (of anything but an image file: a video), lists of images (frames of a video),
        or objects with `url` or `path` and, of a part of a video, `video_start` and `video_end` in seconds.

    Raises:
      SampleError: sound, or nothing that can be shown; names the sample.
    """
    turn, media = _placed(text, [medium(visual, sample=sample) for visual in visuals or ()], sample)
    return Conversation((turn,), media)


def _placed(text: str, media: Sequence[Medium], sample: str) -> tuple[Turn, tuple[Medium, ...]]:
    """A question whose text may say where the media stand, and the media in this order."""
    by_kind = {kind: [each for each in media if each.kind == kind] for kind in (IMAGE, VIDEO)}
    try:
        turn, shown = human_turn(text, len(by_kind[IMAGE]), len(by_kind[VIDEO]), sample=sample)
    except SampleError:  # more or fewer marks than media: they are words
        parts = (*[""] * len(media), f"\n{text}") if media else (text,)
        return Turn("human", parts), (*by_kind[IMAGE], *by_kind[VIDEO])
    left = {kind: iter(own) for kind, own in by_kind.items()}
    return turn, tuple(next(left[kind]) for kind in shown)


def from_messages(messages: Sequence[Mapping[str, Any]], *, sample: str) -> Conversation:
    """A question as a harness's chat models are asked: messages with a role and a list of contents.

    Images and videos stand where the message has them. Where all come before its words, they are placed as in
    `from_context`. Messages of one role that follow each other are one turn.

    Raises:
      SampleError: sound, a kind of content or a role that is not known, an image in an answer, or the last message is
        not the user's; names the sample.
    """
    turns: list[Turn] = []
    media: list[Medium] = []
    for message in messages:
        if (role := ROLES.get(message["role"])) is None:
            raise SampleError(
                sample, f"a message of the role {message['role']!r}; there are {', '.join(ROLES)}"
            )
        contents = message["content"]
        contents = [{"type": "text", "text": contents}] if isinstance(contents, str) else contents
        parts, shown = [""], []
        for content in contents:
            if content["type"] == "text":
                parts[-1] += content["text"]
            else:
                if role != "human":
                    raise SampleError(
                        sample, f"a message of the role {message['role']!r} shows {content['type']}"
                    )
                shown.append(_content(content, sample))
                parts.append("")
        if shown and not any(parts[:-1]):
            turn, shown = _placed(parts[-1], shown, sample)
            parts = list(turn.parts)
        media += shown
        if turns and turns[-1].role == role:
            before = turns.pop().parts
            parts = [*before[:-1], f"{before[-1]}\n{parts[0]}", *parts[1:]]
        turns.append(Turn(role, tuple(parts)))
    if not turns or turns[-1].role != "human":
        raise SampleError(sample, "the last message is not the user's, so there is nothing to answer")
    return Conversation(tuple(turns), tuple(media))


ROLES = {"system": "system", "user": "human", "assistant": "gpt"}


def _content(content: Mapping[str, Any], sample: str) -> Medium:
    kind, source = content["type"], content.get("url")
    if kind == "image":
        return Medium(IMAGE, _local(source, sample))
    if kind == "video":
        own = _segment(content.get("start_time"), content.get("end_time"))
        if not isinstance(source, Mapping):
            return Medium(VIDEO, _local(source, sample), own)
        found = medium(source, sample=sample)
        return found if own is None else Medium(VIDEO, found.source, own)
    raise SampleError(sample, f"shows {kind!r}; this model reads text, images and videos")


def medium(visual: Any, *, sample: str) -> Medium:
    """An image or a video in any form in which a harness's tasks have it; see `from_context`."""
    if isinstance(visual, Mapping):
        kind, source = visual.get("type", "video"), visual.get("url", visual.get("path"))
        if kind not in ("image", "video") or source is None:
            raise SampleError(sample, f"shows {sorted(visual)}; this model reads text, images and videos")
        if kind == "image":
            return Medium(IMAGE, _local(source, sample))
        own = _segment(visual.get("video_start"), visual.get("video_end"))
        return Medium(VIDEO, _local(source, sample), own)
    if isinstance(visual, str | os.PathLike):
        suffix = pathlib.PurePath(visual).suffix.lower()
        if suffix in SOUND_FILES:
            raise SampleError(sample, f"shows sound ({visual}); this model reads text, images and videos")
        return Medium(IMAGE if suffix in IMAGE_FILES else VIDEO, _local(visual, sample))
    if isinstance(visual, list | tuple) or (isinstance(visual, np.ndarray) and visual.ndim == 4):
        return Medium(VIDEO, visual)
    return Medium(IMAGE, visual)


def _segment(start: float | int | None, end: float | int | None) -> Segment | None:
    if start is None and end is None:
        return None
    return float(start or 0.0), float("inf") if end is None else float(end)


def _local(source: Any, sample: str) -> Any:
    if isinstance(source, str) and "://" in source:
        raise SampleError(sample, f"shows {source}, which is not fetched; download it and give its path")
    return source


class Media:
    """The images and videos of one conversation for a model that reads them."""

    def __init__(self, model: Model, media: Sequence[Medium], sample: str):
        self._model, self._media, self._sample = model, media, sample
        self._videos: dict[int, OpenVideo] = {}  # counting frames reads a file

    def shown(self) -> list[Shown]:
        """An image by what reads its size, a video by its number of frames.

        Raises:
          ImageError: a video that cannot be used.
        """
        return [
            self._video(index).total
            if each.kind == VIDEO
            else (lambda index=index: self._rgb(index).shape[:2])
            for index, each in enumerate(self._media)
        ]

    def load(self, index: int, layout: VisualLayout) -> UInt8[np.ndarray, "n H W 3"]:
        """The slots of one of them as the model takes them; safe to call from several threads.

        Raises:
          ImageError: it cannot be used.
        """
        if self._media[index].kind == VIDEO:
            return self._model.frames(self._video(index))
        return slot_images(self._model.processor, self._rgb(index), layout)

    def _rgb(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        source = f"{self._sample}, image {index}"
        limits = {"compat": self._model.compat, "max_pixels": self._model.max_image_pixels}
        return rgb(self._media[index].source, source=source, **limits)

    def _video(self, index: int) -> OpenVideo:
        if index not in self._videos:
            own = self._media[index]
            name = "" if isinstance(own.source, str | os.PathLike) else f"{self._sample}, video {index}"
            self._videos[index] = open_video(own.source, own.segment, name=name)
        return self._videos[index]
