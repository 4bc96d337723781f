"""The text of an answer while it grows: what can be shown already, and whether a text that ends it has come."""

from collections.abc import Sequence
from typing import Any

from mllm_jax.inference.generate import stop_place

_UNFINISHED = "\ufffd"  # how decoders write a character whose last bytes are missing


class GrowingText:
    """Turns tokens into pieces of text that together are what `generate.decode_answer` makes of the whole answer.

    A piece is held back where it may still change: half a character, white space that may be the answer's last, and
    what may be the beginning of a text that ends the answer.

    Args:
      tokenizer: a Hugging Face tokenizer.
      stop_texts: texts that end the answer.

    Attributes:
      stopped: whether one of them has come.
    """

    def __init__(self, tokenizer: Any, stop_texts: Sequence[str]):
        self._tokenizer, self._stop_texts = tokenizer, [stop for stop in stop_texts if stop]
        self._ids: list[int] = []
        self._from = self._read = (
            0  # ids before `_read` are in `_text`; decoding begins at `_from`, for context
        )
        self._text = ""
        self._given = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """What can be shown after one more token; "" if nothing new can."""
        self._ids.append(token)
        self._decode(whole=False)
        return self._piece(whole=self.stopped)

    def finish(self) -> str:
        """What was held back."""
        self._decode(whole=True)
        return self._piece(whole=True)

    def _decode(self, whole: bool) -> None:
        if self.stopped:
            return
        before = self._spelled(self._ids[self._from : self._read])
        now = self._spelled(self._ids[self._from :])
        if whole or (len(now) > len(before) and not now.endswith(_UNFINISHED)):
            self._text += now[len(before) :]
            self._from, self._read = self._read, len(self._ids)
        if (cut := stop_place(self._text, self._stop_texts)) is not None:
            self._text, self.stopped = self._text[:cut], True

    def _spelled(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _piece(self, whole: bool) -> str:
        shown = len(self._text)
        if not whole:
            shown -= max((_overlap(self._text, stop) for stop in self._stop_texts), default=0)
        shown = len(self._text[:shown].rstrip())
        if not self._given:  # white space before the answer is not part of it
            self._given = len(self._text) - len(self._text.lstrip())
        piece = self._text[self._given : shown]
        self._given = max(self._given, shown)
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
