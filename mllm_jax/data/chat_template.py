"""The tokenizer's own chat template as one of ours.

A Jinja chat template is a program over a list of messages. What training needs of it is where its strings stand
between questions and answers, so it is asked to write a few small conversations of placeholder words and the text
around them is taken as a `Template`. Labels, images and prompts then work as with every other template.

The program runs in a process of its own (`template_worker`), with limits on its time and memory and with a clock that
stands still: a prompt that names today's date would be another one tomorrow.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from mllm_jax import limits
from mllm_jax.data.span_tokenizer import span_tokenizer
from mllm_jax.data.templates import CHAT, DAY, TEMPLATES, Template, chat_day, get_template, is_chat

ARGUMENTS = {
    "enable_thinking": False
}  # what templates take defaults for: no reasoning before the answer (Qwen3)
_WORKER = Path(__file__).with_name("template_worker.py")
_SYSTEM, _Q1, _A1, _Q2, _A2 = (f"placeholder{word}" for word in ("system", "alpha", "beta", "gamma", "delta"))
_CHATS: dict[str, tuple[Sequence[str], bool]] = {
    "one": ((_Q1, _A1), False),
    "opened": ((_Q1,), True),
    "two": ((_Q1, _A1, _Q2, _A2), False),
    "spaced human": ((f" {_Q1} ", _A1), False),
    "spaced gpt": ((_Q1, f" {_A1} "), False),
    "system": ((_SYSTEM, _Q1, _A1, _Q2, _A2), False),
    "spaced system": ((f" {_SYSTEM} ", _Q1, _A1, _Q2, _A2), False),
}
_OPTIONAL = ("system", "spaced system")  # templates without a place for a system text may refuse these


def resolve_template(name: str | Template, tokenizer: Any) -> Template:
    """The template of that name; "chat" is the tokenizer's own.

    Args:
        name: a name in `TEMPLATES`, "chat", "chat@YYYY-MM-DD" to have it written as if on that day, or a template,
            which is passed through.
        tokenizer: a Hugging Face tokenizer, or a `SpanTokenizer` around one; None when there is none.

    Raises:
        ValueError: no such template or day, or the tokenizer has none or one that cannot be taken apart.
    """
    if isinstance(name, Template):
        return name
    if not is_chat(name) or tokenizer is None:
        return get_template(name)  # which says that "chat" needs a tokenizer
    return chat_template(getattr(tokenizer, "tokenizer", tokenizer), chat_day(name))


def chat_template(tokenizer: Any, day: datetime.date = DAY) -> Template:
    """The tokenizer's `chat_template` taken apart, as it is written on a day.

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
    dated = {"date_string": f"{day:%d %b %Y}"}  # Llama 3.2
    variables = json.dumps(tokenizer.special_tokens_map | ARGUMENTS | dated, sort_keys=True)
    texts = _written(tokenizer.get_chat_template(), variables, day.isoformat())
    first_open, middle, tail = _around(texts["one"], [_Q1, _A1])
    begin, header = _around(texts["opened"], [_Q1])
    if begin != first_open or not middle.startswith(header):
        raise ValueError(
            f"the tokenizer's chat template opens an answer with {header!r} for generation but with {middle!r} before "
            "a given one; choose another template"
        )
    two = texts["two"]
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
        stripped=tuple(role for role in ("human", "gpt") if texts[f"spaced {role}"] == texts["one"]),
    )
    template = _with_system(template, texts, tokenizer)
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
    for text in (*fields, template.answer_lead, template.answer_close, *(template.system or ())):
        for special in _specials(wrapped.tokenizer, text):
            if special not in template.specials:
                raise ValueError(
                    f"the template writes {special!r} as text, but in this tokenizer it is one token; choose "
                    f"{CHAT!r}, the tokenizer's own template, or one of the LLM's family"
                )


@functools.lru_cache(maxsize=32)
def _written(chat_template: str, variables: str, day: str) -> dict[str, str]:
    """What a chat template makes of each of `_CHATS`; those in `_OPTIONAL` may be missing.

    Raises:
        ValueError: it fails, or takes more time or memory than the limits; says which.
    """
    seconds, size = limits.limit("MAX_TEMPLATE_SECONDS"), limits.limit("MAX_TEMPLATE_BYTES")
    asked = {
        "template": chat_template,
        "variables": json.loads(variables),
        "chats": [(_messages(contents), answer_next) for contents, answer_next in _CHATS.values()],
        "date": day,
        "seconds": seconds,
        "bytes": size,
    }
    command = [sys.executable, "-P", str(_WORKER)]
    try:
        ran = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        ran = subprocess.CompletedProcess(command, -1, "", "")
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-1:]
        raise ValueError(
            f"the tokenizer's chat template takes more than {seconds} s (MLLM_JAX_MAX_TEMPLATE_SECONDS) or {size:,} "
            f"bytes of memory (MLLM_JAX_MAX_TEMPLATE_BYTES) to write a conversation of four messages{': ' * bool(last)}"
            f"{''.join(last)[:200]}; choose another template"
        )
    answer = json.loads(ran.stdout)
    if answer["dated"]:
        logging.warning(
            "the tokenizer's chat template writes the day's date, here always %s; the template %r sets another",
            day,
            f"{CHAT}@YYYY-MM-DD",
        )
    texts = dict(zip(_CHATS, answer["texts"], strict=True))
    for name, text in texts.items():
        if isinstance(text, dict) and name not in _OPTIONAL:
            raise ValueError(
                f"the tokenizer's chat template cannot write a conversation of {len(_CHATS[name][0])} messages "
                f"({text['error']}); choose another template"
            )
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _messages(contents: Sequence[str]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": contents[0]}] if _SYSTEM in contents[0] else []
    rest = contents[len(system) :]
    return system + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(rest)]


def _with_system(template: Template, texts: dict[str, str], tokenizer: Any) -> Template:
    """The template with its place for a sample's own system text, if it has one at the beginning."""
    without = texts["two"].removeprefix(template.first_open)
    written = texts.get("system", "").removesuffix(without)
    before, found, after = written.partition(_SYSTEM)
    if not found or written + without != texts["system"] or _SYSTEM in after:
        return template
    if not before.strip() and after.startswith(template.answer_close):
        return template  # it does not know the role and writes the text as if it were an answer
    stripped = ("system",) * (texts.get("spaced system") == texts["system"])
    return dataclasses.replace(
        template,
        system=(before, after),
        specials=_specials(tokenizer, "".join((before, after, *template.specials))),
        stripped=(*template.stripped, *stripped),
    )


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
