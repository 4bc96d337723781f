"""Tokens and labels with tokenizers of the structure of published LLMs, and their own chat templates.

The oracle is transformers: the ids of a whole conversation by `apply_chat_template`, or by tokenizing the whole text.
"""

import functools
import importlib.util
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizer_files
from tokenizer_files import CHATS
from transformers import AutoTokenizer

from mllm_jax.data.chat_template import ARGUMENTS, chat_template, check_template, resolve_template
from mllm_jax.data.conversations import SampleError, parse_turns, render
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.span_tokenizer import SpanTokenizer, span_tokenizer
from mllm_jax.data.templates import TEMPLATES, same_template
from mllm_jax.data.tokens import encode_prompt, encode_sample, stop_ids

HAS_SENTENCEPIECE = importlib.util.find_spec("sentencepiece") is not None
needs_sentencepiece = pytest.mark.skipif(not HAS_SENTENCEPIECE, reason="sentencepiece reads tokenizer.model")
THEIRS = ARGUMENTS | {"date_string": "26 Jul 2024"}
TEXTS = ("What is there?\n 12 dogs", "A black cat.\nAnd Ünïcode 犬!", " How many? ", "three\n\nof them ")


@functools.cache
def load(name):
    """The tokenizer of a family, read from files as a user's is."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer_files.write(Path(directory), name)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def turns(*texts):
    raw = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return parse_turns(raw, sum(text.count("<image>") for text in texts), sample="s").turns


def theirs(tokenizer, texts, answer_next=False):
    """ids of the whole conversation, as transformers makes them."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    made = tokenizer.apply_chat_template(
        messages, add_generation_prompt=answer_next, return_dict=False, **THEIRS
    )
    return list(made)


@pytest.mark.parametrize("name", sorted(CHATS))
def test_pieces_are_encoded_as_a_call_of_the_tokenizer_does(name):
    """The call is passed by where its flags are set; another's call changes them."""
    tokenizer = load(name)
    wrapped = SpanTokenizer(tokenizer)
    assert wrapped._plain
    for text in ("Hello  two\n\n", "a</s>b<|im_end|>", "<s>\x01日本語 😀", "", *TEXTS):
        called = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        tokenizer("x")
        assert [wrapped._encode(text), wrapped._encode(text)] == [called, called]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("name", CHATS)
def test_chat_templates_give_transformers_ids(name, rounds):
    tokenizer, texts = load(name), TEXTS[: 2 * rounds]
    conversation = turns(*texts)
    template = chat_template(tokenizer)
    sample = encode_sample(render(template, conversation), tokenizer, [], sample="s")
    if name == "qwen3" and rounds == 2:  # we write the empty block before every answer
        expected = theirs(tokenizer, texts[:2]) + theirs(tokenizer, texts[2:])
    else:
        expected = theirs(tokenizer, texts)
    assert sample.tokens.tolist() == expected[: len(sample)]
    assert tokenizer.decode(expected[len(sample) :]).strip() == ""  # ChatML's newline after the end

    prompt = encode_prompt("chat", conversation[:-1], tokenizer, [], sample="s")
    if name != "qwen3" or rounds == 1:
        assert prompt.tokens.tolist() == theirs(tokenizer, texts[:-1], answer_next=True)
    np.testing.assert_array_equal(prompt.tokens, sample.tokens[: len(prompt)])
    assert sample.loss_weights[len(prompt) :].all()

    # the labels are the answers and their ends, and nothing else
    learned = tokenizer.decode(sample.tokens[sample.loss_weights > 0].tolist())
    stripped = "gpt" in template.stripped
    answers = [text.strip() if stripped else text for text in texts[1::2]]
    wanted = "".join(template.answer_lead + answer + template.answer_close for answer in answers)
    assert learned.replace(" ", "") == wanted.replace(" ", "")
    close = template.answer_close.strip()
    assert stop_ids("chat", tokenizer) == sorted(
        {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(close)}
    )


@pytest.mark.parametrize("name", CHATS)
def test_images_stand_where_the_question_has_them(name):
    tokenizer = load(name)
    spans = render(chat_template(tokenizer), turns("<image>\nWhat is there?", "A cat."))
    sample = encode_sample(spans, tokenizer, [WholeImage(Slot(3))()], sample="s")
    visual = sample.visual_index >= 0
    assert visual.sum() == 3
    before = tokenizer.decode(sample.tokens[: int(np.argmax(visual))].tolist()).replace(" ", "")
    assert before.endswith(chat_template(tokenizer).first_open.split("\n")[-1].replace(" ", ""))
    assert sample.loss_weights[: len(sample) - 2].sum() < len(sample)


FIXED = [
    ("llama_1", "vicuna_v1"),
    ("llama_2", "vicuna_v1"),
    pytest.param("vicuna", "vicuna_v1", marks=needs_sentencepiece),
    pytest.param("vicuna", "plain", marks=needs_sentencepiece),
    ("llama_1", "mistral_instruct"),  # before Mistral's markers became tokens
    ("llama_2", "llava_llama_2"),
    ("llama_3", "llama_3"),
    ("llama_3", "llama_3_fixed"),
    ("qwen2", "chatml_direct"),
    ("qwen2", "mpt"),
    ("phi", "phi"),
    ("gemma", "v0"),
]


@pytest.mark.parametrize(("name", "template"), FIXED)
def test_fixed_templates_give_the_ids_of_the_whole_text(name, template):
    tokenizer = load(name)
    check_template(TEMPLATES[template], tokenizer)
    texts = ["<image>\nWhat is there?", "A black  cat.", "How many?", "three    dogs, 7"]
    texts = texts[:2] if template == "plain" else texts
    spans = render(template, turns(*texts))
    sample = encode_sample(spans, tokenizer, [WholeImage(Slot(1))()], sample="s")
    text = "".join(span.text for span in spans).removeprefix(tokenizer.bos_token or "<s>")
    bos = span_tokenizer(tokenizer).bos
    first, second = ([*bos, *tokenizer(piece).input_ids[len(bos) :]] for piece in text.split("<image>"))
    assert sample.tokens.tolist() == [*first, 0, *second[len(bos) :]]
    prompt = encode_prompt(template, turns(*texts)[:-1], tokenizer, [WholeImage(Slot(1))()], sample="s")
    np.testing.assert_array_equal(prompt.tokens, sample.tokens[: len(prompt)])
    assert sample.loss_weights[len(prompt) :].all()
    assert tokenizer.decode(sample.tokens[-4:].tolist()).endswith(TEMPLATES[template].answer_close)


def test_markers_that_are_tokens_must_be_written_as_tokens():
    with pytest.raises(ValueError, match=r"writes '\[(/)?INST\]' as text.* one token"):
        check_template(TEMPLATES["mistral_instruct"], load("mistral"))
    with pytest.raises(ValueError, match=r"'<\|im_start\|>' is not a token of this tokenizer"):
        check_template(TEMPLATES["mpt"], load("phi"))
    for name in CHATS:
        check_template(chat_template(load(name)), load(name))


def test_dates_do_not_depend_on_the_day():
    assert "Today Date: 26 Jul 2024" in chat_template(load("llama_3")).first_open


def test_only_the_named_roles_lose_their_white_space():
    assert chat_template(load("gemma")).stripped == ("human", "gpt", "system")
    assert chat_template(load("qwen2")).stripped == ()
    spans = render(chat_template(load("gemma")), turns(" <image>\nQ \n", " A "))
    assert [span.text for span in spans if span.image or span.text in ("\nQ", "A")] == ["<image>", "\nQ", "A"]


class Tokenizer:
    """What `chat_template` asks of a tokenizer."""

    all_special_tokens = ("</s>",)

    def __init__(self, chat_template):
        self.chat_template = chat_template
        self.special_tokens_map = {"eos_token": "</s>"}

    def get_chat_template(self):
        return self.chat_template

    def get_added_vocab(self):
        return {"</s>": 2}


CONTENTS = "messages | map(attribute='content')"
EACH = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("Q {{ messages[0].content }}</s>", "does not write every message once and in order"),
        ("{% for m in messages %}{{ m.content }} {{ m.content }}</s>{% endfor %}", "once and in order"),
        (
            f"{{{{ {CONTENTS} | join('|') }}}}{{{{ 'Bot:' if add_generation_prompt else '</s>' }}}}",
            "opens an answer with 'Bot:'",
        ),
        (f"{{{{ {CONTENTS} | join }}}}", "does not mark the end of an answer"),
        ("{{ raise_exception('no') }}", r"cannot write a conversation of 2 messages \(TemplateError: no"),
        ("{% for %}", r"cannot write a conversation of 2 messages \(TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_templates_that_cannot_be_taken_apart_are_refused(written, message):
    with pytest.raises(ValueError, match=message):
        chat_template(Tokenizer(written))


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "MAX_TEMPLATE_SECONDS",
        ),
        ("{{ 'a' * 10 ** 12 }}", "MAX_TEMPLATE_BYTES"),
        (
            "{% set n = namespace(t='a') %}{% for i in range(50) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "BYTES",
        ),
        ("{{ 9 ** (9 ** 9) }}", "MAX_TEMPLATE_SECONDS"),
    ],
)
def test_templates_that_loop_or_fill_the_memory_are_stopped(written, limit, monkeypatch):
    monkeypatch.setenv("MLLM_JAX_MAX_TEMPLATE_SECONDS", "2")
    with pytest.raises(ValueError, match=f"{limit}.*choose another template"):
        chat_template(Tokenizer(written))


def test_prompts_do_not_depend_on_the_day():
    dated = "Today is {{ strftime_now('%d %b %Y') }}. " + EACH
    assert chat_template(Tokenizer(dated)).first_open == "Today is 26 Jul 2024. [user]"
    assert resolve_template("chat@2025-01-31", Tokenizer(dated)).first_open == "Today is 31 Jan 2025. [user]"
    with pytest.raises(ValueError, match="'soon' is not a day; write chat@YYYY-MM-DD"):
        resolve_template("chat@soon", Tokenizer(dated))
    assert same_template("chat", "chat@2024-07-26")
    assert not same_template("chat", "chat@2025-01-31")
    assert not same_template("chat", "mini")
    asked = "Today is {{ date_string or strftime_now('%d %b %Y') }}. " + EACH
    assert chat_template(Tokenizer(asked)).first_open == "Today is 26 Jul 2024. [user]"
    assert resolve_template("chat@2025-01-31", Tokenizer(asked)).first_open == "Today is 31 Jan 2025. [user]"


def test_the_place_of_a_samples_own_system_text():
    assert chat_template(Tokenizer(EACH)).system == ("[system]", "</s>[user]")
    default = "{% if messages[0].role != 'system' %}[system]Help.</s>{% endif %}" + EACH
    template = chat_template(Tokenizer(default))
    assert (template.first_open, template.system) == ("[system]Help.</s>[user]", ("[system]", "</s>[user]"))
    refused = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + EACH
    assert chat_template(Tokenizer(refused)).system is None
    dropped = EACH.replace(
        "[{{ m.role }}]", "{% if m.role == 'system' %}{% continue %}{% endif %}[{{ m.role }}]"
    )
    assert chat_template(Tokenizer(dropped)).system is None
    late = (
        "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}{% for m in messages %}"
        "{% if m.role != 'system' %}[{{ m.role }}]{% if m == last and messages[0].role == 'system' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )  # before the last question, as some of Mistral's: not the same in every round
    assert chat_template(Tokenizer(late)).system is None


@pytest.mark.parametrize("name", CHATS)
def test_system_turns_give_transformers_ids(name):
    tokenizer = load(name)
    template = chat_template(tokenizer)
    messages = [
        {"role": "system", "content": "Be brief, ünïcode 犬."},
        {"role": "user", "content": "How many?"},
    ]
    raw = [{"from": "system", "value": messages[0]["content"]}, {"from": "human", "value": "How many?"}]
    prompt = parse_turns([*raw, {"from": "gpt", "value": "12"}], 0, sample="s").turns[:-1]
    if template.system is None:
        with pytest.raises(SampleError, match="has a system turn, but the template has no place"):
            encode_prompt(template, prompt, tokenizer, [], sample="s")
        return
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **THEIRS)
    assert encode_prompt(template, prompt, tokenizer, [], sample="s").tokens.tolist() == list(theirs)


def test_a_tokenizer_without_a_chat_template():
    with pytest.raises(
        ValueError, match="has no chat template of its own; instead of 'chat' choose one of: plain"
    ):
        resolve_template("chat", load("phi"))
    with pytest.raises(ValueError, match="'chat' is the tokenizer's own"):
        render("chat", turns("Q", "A"))
    with pytest.raises(ValueError, match="'chat' is the tokenizer's own"):
        resolve_template("chat", None)
    assert resolve_template("v1", load("phi")) is TEMPLATES["v1"]
    assert resolve_template(TEMPLATES["v1"], None) is TEMPLATES["v1"]
