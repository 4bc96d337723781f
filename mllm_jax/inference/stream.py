"""An answer token by token: its tokens as they are chosen, and the text that they make as soon as it is certain."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.inference.batching import Request
from mllm_jax.inference.prefixes import LoadImage, batch_prompts
from mllm_jax.inference.sampling import Sampling
from mllm_jax.inference.session import Session, progress
from mllm_jax.models.mllm import ModelConfig, Params

# What follows the last image is padded to one of these: few, as each new length is compiled when a conversation gets
# there.
BUCKETS = (64, 256, 1024)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of SentencePiece for one byte
_UNKNOWN = "\ufffd"  # what bytes are decoded to that are no character (yet)


def answer_text(tokenizer: Any, tokens: Sequence[int], stop_texts: Sequence[str] = ()) -> tuple[str, bool]:
    """The text of a whole answer, cut at the first stop text, without surrounding white space; and whether it was cut.

    Args:
      tokenizer: a Hugging Face tokenizer.
      tokens: of the answer.
      stop_texts: texts that end an answer, none of them empty.
    """
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [text.index(stop) for stop in stop_texts if stop in text]
    return text[: min(ends, default=len(text))].strip(), bool(ends)


class TextStream:
    """The text of an answer while its tokens come; the pieces joined are `answer_text` of all tokens.

    Held back until it is certain is what later tokens may change or take away: characters of which some bytes are
    missing, the beginning of a stop text, and white space, which an answer does not end with.

    Example:
        stream = TextStream(model.tokenizer, ["###"])
        for token in tokens:
            print(stream.push(token), end="", flush=True)
            if stream.stopped:
                break
        print(stream.finish())

    Args:
      tokenizer, stop_texts: as in `answer_text`.

    Attributes:
      stopped: a stop text came: later tokens change nothing.
    """

    def __init__(self, tokenizer: Any, stop_texts: Sequence[str] = ()):
        self._tokenizer, self._stop_texts = tokenizer, stop_texts
        self._tokens: list[int] = []
        self._given = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token and was not given yet; often a word, sometimes nothing."""
        self._tokens.append(token)
        # A run of byte tokens becomes characters only as a whole, so no part of it is certain before it ends.
        if self.stopped or _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True).rstrip(_UNKNOWN)
        cut = min((text.index(stop) for stop in self._stop_texts if stop in text), default=len(text))
        begun = min((_begun(text, stop) for stop in self._stop_texts), default=len(text))
        self.stopped = cut < len(text) and cut <= begun
        return self._more(text[: min(cut, begun)].strip())

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return self._more(answer_text(self._tokenizer, self._tokens, self._stop_texts)[0])

    def _more(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        more, self._given = text[len(self._given) :], text
        return more


def _begun(text: str, stop: str) -> int:
    """Where the text ends with a beginning of `stop`; its length if it does not."""
    return next(
        (
            len(text) - size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        len(text),
    )


def stream_tokens(
    config: ModelConfig,
    params: Params,
    request: Request,
    *,
    load_image: LoadImage | None = None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    prefill_bytes: int | None = None,
) -> Iterator[int]:
    """The tokens of one answer as they are chosen, without the stop id; arguments as in `generate.generate`.

    Each token is computed when it is asked for, in the mesh that is current then.

    Raises:
      SampleTooLong, SampleError, ValueError: as `generate.generate`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if (length := len(request.prompt) + max_new_tokens) > config.llm.max_positions:
        raise SampleTooLong(request.id, length, config.llm.max_positions)
    session = Session(config, params, stop_ids=stop_ids, prefill_bytes=prefill_bytes)
    prompts = batch_prompts(
        config, params, [request], load_image=load_image, buckets=BUCKETS, prefill_bytes=prefill_bytes
    )
    state = session.prefill(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
    given = 0
    while True:
        tokens, counts, _, done = jax.device_get(progress(state))
        if counts[0] > given:
            given += 1
            yield int(tokens[0])
        if done[0]:
            return
        state = session.step(state)
