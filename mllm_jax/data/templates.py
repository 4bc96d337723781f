"""Chat templates as rows of strings: how a conversation is written, and which part of it is learned.

The strings are those of LLaVA's, Dense Connector's and Mini-Gemini's conversation files, so that checkpoints
trained there can be used here. Adding a template is adding a row to ``TEMPLATES``.
"""

import dataclasses
import datetime
from typing import Any

from mllm_jax.schema import did_you_mean


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written for an LLM.

    A conversation reads ``first_open Q1 user_close answer_open answer_lead A1 answer_close user_open Q2
    ...``. Everything is masked but ``answer_lead``, the answer and ``answer_close``. A prompt for generation
    stops after ``answer_open``; the space before an answer belongs to the learned side, as it is a part of
    the answer's first token in every common vocabulary.

    Attributes:
        first_open: before the first question, system text included.
        user_open: before every later question.
        user_close: after a question.
        answer_open: the role header of the answer.
        answer_lead: learned text before the answer.
        answer_close: learned text after the answer; what ends a generated answer.
        specials: strings in the fields above that are single tokens of the vocabulary.
        captions: an alignment template: one round, the question's words are dropped, only its images stay.
        stripped: roles ("human", "gpt") whose text loses the white space around it.
        system: what stands before and after a sample's own system text, all three in the place of ``first_open``;
            None where the template has no place for one.
    """

    first_open: str
    user_open: str
    user_close: str
    answer_open: str
    answer_lead: str
    answer_close: str
    specials: tuple[str, ...] = ()
    captions: bool = False
    stripped: tuple[str, ...] = ()
    system: tuple[str, str] | None = None


_CURIOUS = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_HONEST = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)


def _template(before: str, system: str, after: str, *fields: str, **named: Any) -> Template:
    """A template with a system text, in whose place a sample may have its own."""
    return Template(before + system + after, *fields, system=(before, after), **named)


def _two_separators(who: str, end: str) -> Template:
    return _template(
        "", _CURIOUS.format(who), " USER: ", "USER: ", " ", "ASSISTANT:", " ", end, specials=(end,)
    )


def _chatml(system: str) -> Template:
    return _template(
        "<|im_start|>system\n",
        system,
        "<|im_end|><|im_start|>user\n",
        user_open="<|im_start|>user\n",
        user_close="<|im_end|>",
        answer_open="<|im_start|>assistant\n",
        answer_lead="",
        answer_close="<|im_end|>",
        specials=("<|im_start|>", "<|im_end|>"),
    )


def _llama_3(assistant: str) -> Template:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return _template(
        f"<|begin_of_text|>{header('system')}",
        _VISION,
        f"<|eot_id|>{header('user')}",
        user_open=header("user"),
        user_close="<|eot_id|>",
        answer_open=header(assistant),
        answer_lead="",
        answer_close="<|eot_id|>",
        specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )


_V1 = _two_separators("user", "</s>")
_V0 = _template("", _CURIOUS.format("human"), "###Human: ", "Human: ", "###", "Assistant:", " ", "###")
_CHATML_DIRECT = _chatml("Answer the questions.")

CHAT = "chat"  # the tokenizer's own chat template (chat_template.py), see `is_chat`
TEMPLATES: dict[str, Template] = {
    "plain": Template("", "", "", "", "", "\n", captions=True),
    "v1": _V1,
    "vicuna_v1": _V1,
    # v1 without its system text, for LLMs as small as the shipped mini LLM.
    "mini": Template("USER: ", "USER: ", " ", "ASSISTANT:", " ", "</s>", ("</s>",)),
    "llava_v1": _two_separators("human", "</s>"),
    "phi": _two_separators("user", "<|endoftext|>"),
    "v0": _V0,
    "llava_v0": _V0,
    "llava_llama_2": _template(
        "[INST] <<SYS>>\n",
        _VISION,
        "\n<</SYS>>\n\n",
        user_open="<s>[INST] ",
        user_close=" [/INST]",
        answer_open="",
        answer_lead=" ",
        answer_close=" </s>",
        specials=("<s>", "</s>"),
    ),
    "mistral_instruct": Template("[INST] ", "[INST] ", " [/INST]", "", " ", " </s>", ("</s>",)),
    "chatml_direct": _CHATML_DIRECT,
    "mistral_direct": _CHATML_DIRECT,
    "mpt": _chatml(_HONEST),
    # Dense Connector and Mini-Gemini write the assistant's header as "system", and so were their checkpoints
    # trained; the fixed form is for new training.
    "llama_3": _llama_3("system"),
    "llama_3_fixed": _llama_3("assistant"),
}


DAY = datetime.date(
    2024, 7, 26
)  # on which chat templates are written; Llama 3.1's own where it is given none
NAMES = f"{', '.join(TEMPLATES)}, {CHAT}, {CHAT}@YYYY-MM-DD"  # for messages


def is_chat(name: str | Template) -> bool:
    """Whether a name is that of the tokenizer's own template: "chat", or "chat@2025-01-31" with the day's date."""
    return isinstance(name, str) and name.partition("@")[0] == CHAT


def chat_day(name: str) -> datetime.date:
    """The day on which the tokenizer's own template is written, by its name.

    Raises:
        ValueError: what stands behind the "@" is no day.

    Example:
        >>> chat_day("chat@2025-01-31")
        datetime.date(2025, 1, 31)
    """
    _, at, given = name.partition("@")
    try:
        return datetime.date.fromisoformat(given) if at else DAY
    except ValueError:
        raise ValueError(f"template {name!r}: {given!r} is not a day; write {CHAT}@YYYY-MM-DD") from None


def check_name(name: str) -> str:
    """The name itself, if it can be a template's: one in `TEMPLATES`, "chat" or "chat@YYYY-MM-DD".

    Raises:
        ValueError: no such template or day; the message names the nearest and lists all.
    """
    if is_chat(name):
        chat_day(name)
    else:
        get_template(name)
    return name


def same_template(one: str, other: str) -> bool:
    """Whether two names are of one template ("v1" and "vicuna_v1"; "chat" and "chat@" with the day that it means)."""
    if is_chat(one) and is_chat(other):
        return chat_day(one) == chat_day(other)
    return one == other or TEMPLATES.get(one, one) is TEMPLATES.get(other, other)


def get_template(name: str) -> Template:
    """The template of that exact name; for "chat", which needs a tokenizer, see `chat_template.resolve_template`.

    Raises:
        ValueError: no such template; the message names the nearest and lists all.
    """
    if is_chat(name):
        raise ValueError("template 'chat' is the tokenizer's own: a tokenizer is needed to know it")
    if name not in TEMPLATES:
        near = did_you_mean(name, [*TEMPLATES, CHAT])
        raise ValueError(f"unknown template {name!r}; {near}one of: {NAMES}")
    return TEMPLATES[name]
