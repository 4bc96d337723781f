"""From the messages of a request to a prompt of the model: its own template, built as for evaluation."""

import contextlib
import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from mllm_jax.data.conversations import IMAGE, VIDEO, SampleError
from mllm_jax.data.images import ImageError
from mllm_jax.data.layout import Shown, VisualLayout, layouts
from mllm_jax.data.video import OpenVideo, open_video
from mllm_jax.inference.batching import Request
from mllm_jax.inference.model import Model
from mllm_jax.inference.prompts import conversation, encode_conversation
from mllm_jax.serve.errors import ApiError
from mllm_jax.serve.media import Media
from mllm_jax.serve.schema import Message, TextPart, VideoPart

ID = "0"  # of every request: `Model.generate` makes the draws of a single prompt from it and the seed
_Slots = UInt8[np.ndarray, "n H W 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt with its images, decoded.

    Attributes:
      model: what it is for; one that reads videos, where the prompt shows some.
      request: images have their files' digests as keys.
      slots: of each image and video.
    """

    model: Model
    request: Request
    slots: Mapping[Hashable, _Slots]

    def load_image(self, key: Hashable, layout: VisualLayout) -> _Slots:
        """The slots of an image or video."""
        return self.slots[key]

    @property
    def reads_video(self) -> bool:
        """Whether it shows a video."""
        return any(kind == VIDEO for kind, _ in self.request.images)


@dataclasses.dataclass(frozen=True)
class _Question:
    words: str
    images: tuple[tuple[str, bytes], ...]  # (field of the request, file)
    videos: tuple[tuple[str, bytes | tuple[bytes, ...]], ...]


def build_prompt(
    model: Model, messages: Sequence[Message], media: Media, *, most_images: int, answered: bool = False
) -> Prompt:
    """The prompt of a conversation.

    An image stands where its part does if there are words before and behind images of that message, else first, on a
    line of its own, as in training.

    Args:
      model: its template is used.
      messages: system text, if any, then questions and answers in turn.
      media: where images come from.
      most_images: of all messages together, videos counted as images.
      answered: the last message is the answer, which becomes part of the sequence; else it is a question.

    Raises:
      ApiError: 400; messages that cannot be a prompt; names the field.
    """
    system, rest, first = _system(messages)
    answer = None
    if answered:
        if not rest or rest[-1].role != "assistant":
            raise ApiError(400, "the last message must be the assistant's", param="messages")
        param = f"messages.{len(messages) - 1}"
        answer = _words(rest[-1], param)
        if not answer.strip():
            raise ApiError(400, f"{param}: the answer is empty", param=f"{param}.content")
        rest = rest[:-1]
    for index, message in enumerate(rest, first):
        if message.role != ("user", "assistant")[(index - first) % 2]:
            param = f"messages.{index}.role"
            raise ApiError(
                400, f"{param}: after a system message, user and assistant take turns", param=param
            )
    if not rest or rest[-1].role != "user":
        raise ApiError(400, "the last message must be the user's", param="messages")
    count = sum(not isinstance(part, TextPart) for message in rest for part in message.parts)
    if count > most_images:
        raise ApiError(400, f"{count} images and videos; at most {most_images} are allowed", param="messages")
    said = [_words(message, f"messages.{first + i}") for i, message in enumerate(rest) if i % 2]
    asked = [
        _question(message, f"messages.{first + i}", media) for i, message in enumerate(rest) if not i % 2
    ]
    try:
        return _encoded(model, asked, said, system, answer)
    except SampleError as error:
        raise ApiError(400, error.problem, param="messages") from error
    except ImageError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_media") from error
    except ModuleNotFoundError as error:
        raise ApiError(400, str(error), param="messages", code="unsupported_media") from error
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error


def _system(messages: Sequence[Message]) -> tuple[str | None, list[Message], int]:
    """The system text, the other messages, and how many the first ones were."""
    first = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    texts = [_words(message, f"messages.{index}") for index, message in enumerate(messages[:first])]
    return "\n".join(texts) if texts else None, list(messages[first:]), first


def _words(message: Message, param: str) -> str:
    """The text of a message that has no images; an answer's may be empty, for models do answer so."""
    if not all(isinstance(part, TextPart) for part in message.parts):
        raise ApiError(400, f"{param}: only the user's messages can show images", param=f"{param}.content")
    text = "\n".join(part.text for part in message.parts)
    if not text.strip() and message.role != "assistant":
        raise ApiError(400, f"{param}: the message is empty", param=f"{param}.content")
    return text


def _question(message: Message, param: str, media: Media) -> _Question:
    parts = message.parts
    texts = [isinstance(part, TextPart) for part in parts]
    shown = [i for i, text in enumerate(texts) if not text]
    among = bool(shown) and True in texts[: shown[-1]] and True in texts[shown[0] :]
    words: list[str] = []
    images, videos = [], []
    for index, part in enumerate(parts):
        where = f"{param}.content.{index}"
        if isinstance(part, TextPart):
            words.append(part.text)
            continue
        video = isinstance(part, VideoPart)
        if among:
            words.append(VIDEO if video else IMAGE)
        found = media.read((part.video_url if video else part.image_url).url, where)
        if video:
            videos.append((where, found))
        elif isinstance(found, tuple):
            raise ApiError(400, f"{where}: frames of a video are given as a video_url", param=where)
        else:
            images.append((where, found))
    text = "\n".join(words)
    if not text.strip() and not shown:
        raise ApiError(400, f"{param}: the message is empty", param=f"{param}.content")
    return _Question(text, tuple(images), tuple(videos))


def _encoded(
    model: Model, asked: Sequence[_Question], said: Sequence[str], system: str | None, answer: str | None
) -> Prompt:
    if any(question.videos for question in asked) and model.config.video is None:
        model = model.with_video()
    counts = [(question.words, len(question.images), len(question.videos)) for question in asked]
    turns, shown = conversation(counts, said, system, sample=ID)
    with contextlib.ExitStack() as stack:
        kept = _Kept(model, stack)
        left = {
            IMAGE: iter([kept.image(*image) for question in asked for image in question.images]),
            VIDEO: iter([kept.video(*video) for question in asked for video in question.videos]),
        }
        keys = tuple(next(left[kind]) for kind in shown)
        found = layouts(model.config.visual_layout, [kept.shown(key) for key in keys], sample=ID)
        sample = encode_conversation(model, turns, found, answer, sample=ID)
        slots = {key: kept.slots(key, layout) for key, layout in zip(keys, found, strict=True)}
    return Prompt(model, Request(ID, sample, keys), slots)


class _Kept:
    """The files of a request by their digests; equal ones are decoded once."""

    def __init__(self, model: Model, stack: contextlib.ExitStack):
        self._model, self._stack = model, stack  # which removes the folder of videos, if one is needed
        self._folder: str | None = None
        self._images: dict[Hashable, tuple[str, bytes]] = {}
        self._videos: dict[Hashable, OpenVideo] = {}

    def image(self, param: str, data: bytes) -> Hashable:
        key = (IMAGE, hashlib.sha256(data).digest())
        self._images.setdefault(key, (param, data))
        return key

    def video(self, param: str, found: bytes | tuple[bytes, ...]) -> Hashable:
        frames = isinstance(found, tuple)
        whole = b"".join(hashlib.sha256(data).digest() for data in found) if frames else found
        key = (VIDEO, hashlib.sha256(whole).digest())
        if key not in self._videos:
            self._videos[key] = self._opened(param, found, key[1].hex())
        return key

    def _opened(self, param: str, found: bytes | tuple[bytes, ...], name: str) -> OpenVideo:
        if self._folder is None:
            self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mllm_jax_"))
        path = pathlib.Path(self._folder, name)
        if isinstance(found, bytes):
            path.write_bytes(found)
        else:  # of a folder, only those that are picked are decoded
            path.mkdir()
            for index, data in enumerate(found):
                (path / f"{index}.jpg").write_bytes(data)
        return open_video(path, name=param)

    def shown(self, key: Hashable) -> Shown:
        if key in self._videos:
            return self._videos[key].total
        param, data = self._images[key]
        return lambda: self._model.image_size(data, param)

    def slots(self, key: Hashable, layout: VisualLayout) -> _Slots:
        if key in self._videos:
            return self._model.frames(self._videos[key])
        param, data = self._images[key]
        return self._model.image(data, param, layout)
