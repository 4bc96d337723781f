"""Encoding pieces of a text with a Hugging Face tokenizer as if the text had been encoded whole.

SentencePiece tokenizers of the Llama family put a "dummy" space before any text they are given (``Q`` becomes
``▁Q``). That is right at the start of a text and, as in LLaVA, after an image, but wrong in the middle of a
line. ``SpanTokenizer`` finds out how a tokenizer behaves and encodes a continuation behind a sentinel whose
tokens it then cuts off, so that the ids equal those of LLaVA's training code for whole prompts.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

SHORT = 100  # characters up to which a text is likely to come again: pieces of a template, questions, answers


class SpanTokenizer:
    """A Hugging Face tokenizer that encodes pieces of a text in their context.

    Attributes:
        tokenizer: the tokenizer given.
        bos: the ids it puts before every text (empty if none).

    Raises:
        ValueError: the tokenizer adds a dummy space and no sentinel could be found to encode text without it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._specials: dict[str, int] = {}
        self._plain = _calls_its_backend(tokenizer)
        alone = self._ids("a")
        full = tokenizer("a", split_special_tokens=True, verbose=False).input_ids
        starts = [i for i in range(len(full) - len(alone) + 1) if full[i : i + len(alone)] == alone]
        self.bos: tuple[int, ...] = tuple(full[: starts[0]]) if starts else ()
        self._sentinel: str | None = None
        self._head: list[int] = []
        self._dummy_after_special = False
        if self._opens_with_space(alone):
            self._sentinel = self._find_sentinel()
            self._head = self._ids(self._sentinel)
            special = next(iter(tokenizer.all_special_tokens), None)
            if special is not None:
                behind = tokenizer(special + "a", add_special_tokens=False, verbose=False).input_ids[1:]
                self._dummy_after_special = behind == alone

    def _ids(self, text: str) -> list[int]:
        return list(_repeated(self, text)) if len(text) <= SHORT else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        # The same flags in every call: changing them would change the shared backend under other threads.
        if self._plain:
            backend = self.tokenizer.backend_tokenizer
            if backend.encode_special_tokens and backend.truncation is None and backend.padding is None:
                # What the call below comes to, without its 45 µs of bookkeeping.
                return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        ids = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        return list(ids)

    def _opens_with_space(self, ids: Sequence[int]) -> bool:
        token = self.tokenizer.convert_ids_to_tokens(list(ids[:1]))
        return bool(token) and str(token[0]).startswith(("▁", "Ġ"))

    def _find_sentinel(self) -> str:
        """A character whose tokens stay apart from whatever follows it."""
        for sentinel in ("\n", "\x01", "|", ":"):
            head = self._ids(sentinel)
            tails = {}
            for probe in ("a", " a", "\n", "\n\na", "  a", "<", "A", "7"):
                ids = self._ids(sentinel + probe)
                if ids[: len(head)] != head:
                    break
                tails[probe] = ids[len(head) :]
            else:
                unknown = self.tokenizer.unk_token_id
                if (
                    (unknown is None or unknown not in head)
                    and not self._opens_with_space(tails["a"])
                    and self._opens_with_space(tails[" a"])
                ):
                    return sentinel
        raise ValueError(
            f"{type(self.tokenizer).__name__} puts a space before every text and offers no way to encode "
            "text without it; use a byte-level tokenizer or one with byte fallback"
        )

    def start(self, text: str) -> list[int]:
        """Ids of text at the start of a sample or after an image."""
        return self._ids(text)

    def after_special(self, text: str) -> list[int]:
        """Ids of text directly behind a special token."""
        return self.start(text) if self._dummy_after_special else self.middle(text)

    def middle(self, text: str) -> list[int]:
        """Ids of text that goes on where other text ended.

        Raises:
            ValueError: the text merges with the sentinel (never seen with the supported families).
        """
        if self._sentinel is None:
            return self._ids(text)
        ids = self._ids(self._sentinel + text)
        if ids[: len(self._head)] != self._head:
            raise ValueError(f"cannot encode {text[:40]!r} as a continuation with this tokenizer")
        return ids[len(self._head) :]

    def special(self, text: str) -> int:
        """Id of one special token.

        Raises:
            ValueError: the vocabulary does not hold it.
        """
        if (known := self._specials.get(text)) is not None:  # asked for by every sample, and slow to find
            return known
        index = self.tokenizer.convert_tokens_to_ids(text)
        if index is None or (index == self.tokenizer.unk_token_id and text != self.tokenizer.unk_token):
            raise ValueError(
                f"the template's {text!r} is not a token of this tokenizer; choose a template that fits it"
            )
        self._specials[text] = int(index)
        return int(index)

    def text(self, text: str, context: str, markers: dict[str, int]) -> list[int]:
        """Ids of text in its context ("start", "special" or "middle"), never holding one of the markers' ids.

        Tokenizers keep ``special`` tokens apart from text by themselves; chat markers that a vocabulary
        holds as ordinary added tokens are cut after their first character instead.

        Raises:
            ValueError: the text cannot be encoded; says why.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "holds half a character (a lone surrogate such as \\ud83d), which no tokenizer takes; mend it"
            ) from error
        encode = {"start": self.start, "special": self.after_special, "middle": self.middle}[context]
        ids = encode(text)
        spelled = [marker for marker, index in markers.items() if len(marker) > 1 and index in ids]
        if not spelled:
            return ids
        cuts = "|".join(f"(?<={re.escape(marker[0])})(?={re.escape(marker[1:])})" for marker in spelled)
        first, *rest = re.split(cuts, text)
        return encode(first) + [index for piece in rest for index in self.middle(piece)]


def _calls_its_backend(tokenizer: Any) -> bool:
    """Whether a call of a tokenizer is a call of its backend, with nothing of its class's own around it."""
    from transformers import PreTrainedTokenizerFast

    own = type(tokenizer)
    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(own, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    )


@functools.lru_cache(maxsize=1 << 14)
def _repeated(tokenizer: SpanTokenizer, text: str) -> tuple[int, ...]:
    """The ids of a short text; a call of a tokenizer costs far more than its work on one."""
    return tuple(tokenizer._encode(text))


@functools.lru_cache(maxsize=8)
def _cached(tokenizer: Any) -> SpanTokenizer:
    return SpanTokenizer(tokenizer)


def span_tokenizer(tokenizer: Any) -> SpanTokenizer:
    """A ``SpanTokenizer`` around a tokenizer, made once for each; one that is given is passed through."""
    return tokenizer if isinstance(tokenizer, SpanTokenizer) else _cached(tokenizer)
