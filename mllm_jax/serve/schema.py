"""What `/v1/chat/completions` is asked: the fields of OpenAI's API that are understood, and those that are refused."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mllm_jax.schema import did_you_mean
from mllm_jax.serve.errors import ApiError

Model = TypeVar("Model", bound=BaseModel)

# Fields that would change the answer: refused by name, unless they say what happens anyway.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
}
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)


class _Url(BaseModel):
    url: str
    detail: str | None = None


class TextPart(BaseModel):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: _Url


class VideoPart(BaseModel):
    """A video of a message."""

    type: Literal["video_url"]
    video_url: _Url


_KINDS = ("text", "image_url", "video_url")  # which pydantic puts into the place of an error
Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(BaseModel):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=256, fail_fast=True)] | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart | VideoPart]:
        """What it consists of; without content, empty text."""
        if isinstance(self.content, list):
            return self.content
        return [TextPart(type="text", text=self.content or "")]

    @property
    def characters(self) -> int:
        """Length of its text."""
        return sum(len(part.text) for part in self.parts if isinstance(part, TextPart))


# What is wrong is told once: of a million wrong items, so many messages would take gigabytes.
Messages = Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None


_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class ChatRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of the answer; None = not said."""
        return self.max_completion_tokens or self.max_tokens


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body.

    Raises:
      ApiError: 400; names the field.
    """
    request = parse(ChatRequest, body)
    for name, value in request.model_extra.items():
        if value is None or name in IGNORED:
            continue
        if name not in REFUSED:
            hint = did_you_mean(name, ChatRequest.model_fields)
            raise ApiError(400, f"unknown field {name!r}; {hint}leave it out".strip(), param=name)
        if not any(type(value) is type(each) and value == each for each in _alike(REFUSED[name], value)):
            raise ApiError(
                400, f"{name!r} is not supported; leave it out", param=name, code="unsupported_parameter"
            )
    request.model_extra.clear()  # ignored, and maybe large
    return request


def _alike(allowed: tuple[Any, ...], value: Any) -> list[Any]:
    """Numbers compare whether they are written 0 or 0.0."""
    return [float(each) if type(value) is float and type(each) is int else each for each in allowed]


def parse(kind: type[Model], body: bytes) -> Model:
    """A body as a model of pydantic's.

    Raises:
      ApiError: 400; names the field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        deepest = max(
            reversed(found), key=lambda each: len(each["loc"])
        )  # of the forms that a field may have, the nearest
        steps = [
            str(step)
            for step in deepest["loc"]
            if step not in ("str", "constrained-str", *_KINDS) and "[" not in str(step)
        ]
        where = ".".join(steps)
        raise ApiError(400, f"{where or 'body'}: {deepest['msg']}", param=where or None) from None
