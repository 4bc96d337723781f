"""Conversations in LLaVA's JSON form, and how they become text with labels.

``parse_turns`` checks a raw conversation and finds the image placeholders; ``render`` fills a template and
returns spans that know what they are: text or one special token or one image, and whether the model learns to
produce it. The labels of a training sample are therefore decided where the text is produced, and nothing is
ever searched for or re-tokenized later.

Example:
    >>> raw = [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    >>> turns = parse_turns(raw, num_images=1, sample="42").turns
    >>> [span.text for span in render("plain", turns) if span.learn]
    ['A cat.', '\\n']
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from mllm_jax.data.templates import Template, get_template

IMAGE = "<image>"
VIDEO = "<video>"  # where a sample shows videos; read as an image of several slots


class SampleError(ValueError):
    """A problem of one training or evaluation sample; the message and ``sample`` name it."""

    def __init__(self, sample: str, problem: str):
        super().__init__(f"sample {sample!r}: {problem}")
        self.sample = sample
        self.problem = problem

    def __reduce__(self):  # exceptions travel from worker processes; the default rebuilds them from args
        return type(self), (self.sample, self.problem)


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of a rendered conversation.

    Attributes:
        text: the exact characters; ``<image>`` for an image.
        learn: whether the loss covers it.
        image: stands for the visual tokens of the sample's next image.
        special: one token of the vocabulary (a separator such as ``</s>``), as opposed to text that happens
            to spell it.
    """

    text: str
    learn: bool = False
    image: bool = False
    special: bool = False


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn; an image stands between each two consecutive ``parts`` (n images make n + 1 parts)."""

    role: str  # "human" or "gpt"; of the first turn also "system"
    parts: tuple[str, ...]

    @property
    def num_images(self) -> int:
        return len(self.parts) - 1


@dataclasses.dataclass(frozen=True)
class ParsedConversation:
    """Checked turns, and how many turns before the first human one were dropped (0 or 1)."""

    turns: tuple[Turn, ...]
    dropped: int


def parse_turns(
    conversations: object, num_images: int, *, sample: str, compat: str | None = None
) -> ParsedConversation:
    """Check a raw conversation and find its image placeholders.

    Placeholders stay where the user wrote them; several in a turn and several images in a sample are
    supported. ``compat="llava"`` does what LLaVA does instead: in every turn the placeholder moves to the
    front, followed by a newline, several collapse into one, and in a sample without images ``<image>`` is
    ordinary text.

    Args:
        conversations: list of ``{"from": "human" | "gpt", "value": str}``; the first turn may be from "system".
        num_images: how many images the sample has.
        sample: its id, for messages.
        compat: None or "llava".

    Raises:
        SampleError: malformed turns, roles that do not alternate, an empty turn, a placeholder in an answer,
            or a number of placeholders other than ``num_images``.
    """
    if compat not in (None, "llava"):
        raise ValueError(f"unknown compat {compat!r}; None or 'llava'")
    if not isinstance(conversations, Sequence) or isinstance(conversations, str | bytes) or not conversations:
        raise SampleError(sample, "'conversations' is not a non-empty list of turns")
    for index, turn in enumerate(conversations):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("from", "value")
        ):
            raise SampleError(sample, f"turn {index} is not an object with the strings 'from' and 'value'")

    system, first = _system_turn(conversations, sample)
    if first == len(conversations):
        raise SampleError(sample, "the conversation has no turn from 'human'")
    dropped = int(conversations[first]["from"] != "human")
    turns = []
    for index, raw in enumerate(conversations[first + dropped :], first):
        role, value = raw["from"], raw["value"]
        expected = ("human", "gpt")[(index - first) % 2]
        if role != expected:
            raise SampleError(sample, f"turn {index + dropped} is from {role!r} where {expected!r} is due")
        if not value.strip():
            raise SampleError(
                sample, f"turn {index + dropped} ({'answer' if role == 'gpt' else 'question'}) is empty"
            )
        turns.append(_place_images(Turn(role, tuple(value.split(IMAGE))), value, num_images, compat))
    if not turns:
        raise SampleError(sample, "the conversation has no turn from 'human'")

    for index, turn in enumerate(turns, first + dropped):
        if turn.role == "gpt" and turn.num_images and compat is None:
            raise SampleError(sample, f"turn {index} is an answer and holds {IMAGE}; images go in questions")
    found = sum(turn.num_images for turn in turns)
    if found != num_images:
        raise SampleError(sample, f"has {found} {IMAGE} placeholder(s) but {num_images} image(s)")
    return ParsedConversation((*system, *turns), dropped)


def _system_turn(conversations: Sequence[Mapping[str, str]], sample: str) -> tuple[tuple[Turn, ...], int]:
    """The system turn, if the conversation begins with one, and the number of turns that this takes."""
    if conversations[0]["from"] != "system":
        return (), 0
    text = conversations[0]["value"]
    if not text.strip():
        raise SampleError(sample, "turn 0 (system turn) is empty")
    if IMAGE in text:
        raise SampleError(sample, f"turn 0 (system turn) holds {IMAGE}; images go in questions")
    return (Turn("system", (text,)),), 1


def _place_images(turn: Turn, value: str, num_images: int, compat: str | None) -> Turn:
    if compat is None or turn.num_images == 0:
        return turn
    if num_images == 0:
        return Turn(turn.role, (value,))
    text = "".join(turn.parts).strip()
    return Turn(turn.role, ("", ("\n" + text).rstrip()))


def render(
    template: str | Template, turns: Sequence[Turn], add_generation_prompt: bool = False, *, sample: str = "?"
) -> list[Span]:
    """Write turns in a template's form.

    The spans' texts joined are exactly the template's string. Only answers with their lead and close are
    learned.

    Args:
        template: a name in ``TEMPLATES`` or a template.
        turns: from ``parse_turns``.
        add_generation_prompt: end with the open header of an answer; the last turn must be a human's.
        sample: the sample's id, for messages.

    Raises:
        SampleError: a caption template with more than one round, or without an image; a generation prompt
            after an answer; a system turn where the template has no place for one.
    """
    template = get_template(template) if isinstance(template, str) else template
    opening = _fixed(template, template.first_open, learn=False)
    if turns and turns[0].role == "system":
        if template.system is None:
            raise SampleError(
                sample,
                "has a system turn, but the template has no place for a system text; choose a template with one (v1, "
                "chatml_direct, llama_3_fixed, ...), or put the text in the first question",
            )
        before, after = (_fixed(template, text, learn=False) for text in template.system)
        opening = [*before, *_content(_stripped(template, turns[0]), learn=False), *after]
        turns = turns[1:]
    if add_generation_prompt and (not turns or turns[-1].role != "human"):
        raise SampleError(sample, "a prompt for generation must end with a human turn")
    if template.captions:
        expected = 1 if add_generation_prompt else 2
        if len(turns) != expected:
            raise SampleError(
                sample, f"a caption template takes {expected} turn(s), this sample has {len(turns)}"
            )
        if not turns[0].num_images:
            raise SampleError(sample, "a caption template needs an image in the question")
        turns = [Turn("human", ("",) * len(turns[0].parts)), *turns[1:]]

    spans: list[Span] = []
    for index, turn in enumerate(turns):
        if turn.role == "human":
            spans += opening if index == 0 else _fixed(template, template.user_open, learn=False)
            spans += _content(_stripped(template, turn), learn=False)
            spans += _fixed(template, template.user_close, learn=False)
        else:
            spans += _fixed(template, template.answer_open, learn=False)
            spans += _fixed(template, template.answer_lead, learn=True)
            spans += _content(_stripped(template, turn), learn=True)
            spans += _fixed(template, template.answer_close, learn=True)
    if add_generation_prompt:
        spans += _fixed(template, template.answer_open, learn=False)
    return spans


@functools.lru_cache(maxsize=1 << 10)
def _fixed(template: Template, text: str, learn: bool) -> tuple[Span, ...]:
    """A template's own string, cut at its special tokens."""
    if not template.specials:
        return (Span(text, learn),) if text else ()
    pieces = re.split("(" + "|".join(map(re.escape, template.specials)) + ")", text)
    return tuple(Span(piece, learn, special=piece in template.specials) for piece in pieces if piece)


def _stripped(template: Template, turn: Turn) -> Turn:
    if turn.role not in template.stripped:
        return turn
    parts = list(turn.parts)
    parts[0] = parts[0].lstrip()
    parts[-1] = parts[-1].rstrip()
    return Turn(turn.role, tuple(parts))


def _content(turn: Turn, learn: bool) -> list[Span]:
    """A turn's text and images; nothing in it counts as a special token, whatever it spells."""
    spans = []
    for index, part in enumerate(turn.parts):
        if index:
            spans.append(Span(IMAGE, image=True))
        if part:
            spans.append(Span(part, learn))
    return spans
