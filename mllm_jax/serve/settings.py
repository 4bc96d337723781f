"""What an operator decides: how much a request, and all of them together, may take."""

import dataclasses

from mllm_jax.inference.sampling import Sampling
from mllm_jax.serve.media import Media


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits and defaults of a server.

    Attributes:
      slots: answers that a model makes at the same time.
      queue: requests that wait besides those; more are answered with 429.
      most_tokens: of a prompt together with its answer; None = the LLM's context.
      most_prompt_tokens: of a prompt; None = whatever leaves room for an answer.
      answer_tokens: most tokens of an answer where the request does not say.
      temperature: where the request does not say.
      most_body_bytes: of a request.
      most_image_pixels: of an image.
      most_images: of a request, videos counted as images.
      body_seconds: in which a request must have arrived.
      request_seconds: in which an answer must be complete, waiting included.
      api_key: which requests must carry; None = any may ask.
      hosts: names by which the server may be addressed; () = any.
      media: where images come from besides data URIs.
      threads: that decode images and encode prompts.
    """

    slots: int = 16
    queue: int = 64
    most_tokens: int | None = None
    most_prompt_tokens: int | None = None
    answer_tokens: int = 512
    temperature: float | int = 0.0
    most_body_bytes: int = 20 << 20
    most_image_pixels: int = 25_000_000
    most_images: int = 16
    body_seconds: float | int = 30
    request_seconds: float | int = 600
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    media: Media = dataclasses.field(default_factory=Media)
    threads: int = 2

    def __post_init__(self):
        Sampling(self.temperature)  # refuses what cannot be
        if not self.request_seconds > 0:
            raise ValueError("request-seconds must be above 0")
        for field in (
            "slots",
            "queue",
            "most_tokens",
            "most_prompt_tokens",
            "answer_tokens",
            "most_body_bytes",
            "most_image_pixels",
            "most_images",
        ):
            value, least = getattr(self, field), int(field != "queue")
            if value is not None and value < least:
                raise ValueError(f"{field.replace('_', '-')} must be at least {least}")
