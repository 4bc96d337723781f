"""The tokenizer's own chat template as one of ours.

A Jinja chat template is a program over a list of messages. What training needs of it is where its strings stand
between questions and answers, so it is asked to write two small conversations of placeholder words and the text
around them is taken as a `Template`. Labels, images and prompts then work as with every other template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import logging

from mllm_jax.data.span_tokenizer import span_tokenizer
from mllm_jax.data.templates import CHAT, TEMPLATES, Template, get_template

# What templates ask for and take defaults for: no reasoning before the answer (Qwen3), and a date that does not depend
# on the day (Llama 3.2; the value is the one that Llama 3.1's template has).
ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
_Q1, _A1, _Q2, _A2 = (f"placeholder{word}" for word in ("alpha", "beta", "gamma", "delta"))


def resolve_template(name: str | Template, tokenizer: Any) -> Template:
    """The template of that name; "chat" is the tokenizer's own.

    Args:
        name: a name in `TEMPLATES`, "chat", or a template, which is passed through.
        tokenizer: a Hugging Face tokenizer, or a `SpanTokenizer` around one; None when there is none.

    Raises:
        ValueError: no such template, or the tokenizer has none or one that cannot be taken apart.
    """
    if isinstance(name, Template):
        return name
    if name != CHAT or tokenizer is None:
        return get_template(name)  # which says that "chat" needs a tokenizer
    return chat_template(getattr(tokenizer, "tokenizer", tokenizer))


def chat_template(tokenizer: Any) -> Template:
    """The tokenizer's `chat_template` taken apart.

    Every answer is written as the template writes the last one, where it writes earlier ones otherwise (Qwen3: an
    empty block of reasoning before it). What the template writes after the end of the last answer (ChatML: a newline)
    is left out: nothing follows that it could help to predict.

    Raises:
        ValueError: no chat template, or one whose text around questions and answers is not fixed.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"this tokenizer has no chat template of its own; instead of {CHAT!r} choose one of: {', '.join(TEMPLATES)}"
        )
    first_open, middle, tail = _around(_render(tokenizer, [_Q1, _A1]), [_Q1, _A1])
    opened = _render(tokenizer, [_Q1], answer_next=True)
    begin, header = _around(opened, [_Q1])
    if begin != first_open or not middle.startswith(header):
        raise ValueError(
            f"the tokenizer's chat template opens an answer with {header!r} for generation but with {middle!r} before "
            "a given one; choose another template"
        )
    two = _render(tokenizer, [_Q1, _A1, _Q2, _A2])
    between = _around(two, [_Q1, _A1, _Q2, _A2])[2]
    specials = _specials(tokenizer, first_open + middle + between + tail)
    close = _answer_end(_shared_start(tail, between), specials)
    if not close:
        raise ValueError(
            f"the tokenizer's chat template does not mark the end of an answer ({tail!r}); choose another template"
        )
    template = Template(
        first_open=first_open,
        user_open=between.removeprefix(close),
        user_close="",
        answer_open=header,
        answer_lead=middle.removeprefix(header),
        answer_close=close,
        specials=specials,
        stripped=_stripped(tokenizer),
    )
    answer = template.answer_open + template.answer_lead
    ours = f"{first_open}{_Q1}{answer}{_A1}{close}{template.user_open}{_Q2}{answer}{_A2}{tail}"
    if ours != two:
        logging.info(
            "the tokenizer's chat template writes earlier answers otherwise; all are written as the last"
        )
    return template


def check_template(template: Template, tokenizer: Any) -> None:
    """Checks that a template's markers and a tokenizer's special tokens are the same.

    Raises:
        ValueError: one that the tokenizer lacks, or a special token that the template would write as text.
    """
    wrapped = span_tokenizer(tokenizer)
    for special in template.specials:
        wrapped.special(special)
    fields = (template.first_open, template.user_open, template.user_close, template.answer_open)
    for text in (*fields, template.answer_lead, template.answer_close):
        for special in _specials(wrapped.tokenizer, text):
            if special not in template.specials:
                raise ValueError(
                    f"the template writes {special!r} as text, but in this tokenizer it is one token; choose "
                    f"{CHAT!r}, the tokenizer's own template, or one of the LLM's family"
                )


def _render(tokenizer: Any, contents: Sequence[str], answer_next: bool = False) -> str:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer_next, **ARGUMENTS
        )
    except Exception as error:  # whatever a template raises
        raise ValueError(
            f"the tokenizer's chat template cannot write a conversation of {len(contents)} messages "
            f"({type(error).__name__}: {error}); choose another template"
        ) from error


def _around(text: str, words: Sequence[str]) -> list[str]:
    """The pieces of `text` before, between and after the placeholders."""
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise ValueError(
                "the tokenizer's chat template does not write every message once and in order; choose another template"
            )
        pieces.append(before)
    return [*pieces, text]


def _specials(tokenizer: Any, text: str) -> tuple[str, ...]:
    """Markers in `text` that are single tokens, longest first; not white space that a vocabulary holds as such."""
    names = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return tuple(
        sorted((name for name in names if name.strip() and name in text), key=lambda name: (-len(name), name))
    )


def _shared_start(one: str, other: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[:count] if count is not None else min(one, other, key=len)


def _answer_end(text: str, specials: Sequence[str]) -> str:
    """`text` up to the end of its first special token; all of it if there is none."""
    ends = [text.index(name) + len(name) for name in specials if name in text]
    return text[: min(ends)] if ends else text


def _stripped(tokenizer: Any) -> tuple[str, ...]:
    """Whose text loses the white space around it."""
    plain = _render(tokenizer, [_Q1, _A1])
    spaced = {"human": [f" {_Q1} ", _A1], "gpt": [_Q1, f" {_A1} "]}
    return tuple(role for role, contents in spaced.items() if _render(tokenizer, contents) == plain)
