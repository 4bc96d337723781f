"""Templates against the documented strings, and conversations that are not what they should be."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mllm_jax.data.conversations import IMAGE, SampleError, Span, Turn, parse_turns, render
from mllm_jax.data.templates import TEMPLATES, get_template

ASSISTANT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
LLAMA_3 = (
    f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{VISION}<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
    "<|start_header_id|>ROLE<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>ROLE<|end_header_id|>\n\n"
)
CHATML = (
    "<|im_start|>system\nSYSTEM<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
    "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"
)

# The prompt of the second round (as documented), what follows it in training, and what is learned.
GOLDEN = {
    "v1": (
        f"{ASSISTANT} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
        " A2</s>",
        " A1</s> A2</s>",
    ),
    "mini": ("USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:", " A2</s>", " A1</s> A2</s>"),
    "llava_v1": (
        f"{HUMAN} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
        " A2</s>",
        " A1</s> A2</s>",
    ),
    "phi": (
        f"{ASSISTANT} USER: <image>\nQ1 ASSISTANT: A1<|endoftext|>USER: Q2 ASSISTANT:",
        " A2<|endoftext|>",
        " A1<|endoftext|> A2<|endoftext|>",
    ),
    "v0": (
        f"{HUMAN}###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:",
        " A2###",
        " A1### A2###",
    ),
    "llava_llama_2": (
        f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
        " A2 </s>",
        " A1 </s> A2 </s>",
    ),
    "mistral_instruct": (
        "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]",
        " A2 </s>",
        " A1 </s> A2 </s>",
    ),
    "chatml_direct": (
        CHATML.replace("SYSTEM", "Answer the questions."),
        "A2<|im_end|>",
        "A1<|im_end|>A2<|im_end|>",
    ),
    "mpt": (
        CHATML.replace(
            "SYSTEM",
            "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest "
            "answers.",
        ),
        "A2<|im_end|>",
        "A1<|im_end|>A2<|im_end|>",
    ),
    "llama_3": (LLAMA_3.replace("ROLE", "system"), "A2<|eot_id|>", "A1<|eot_id|>A2<|eot_id|>"),
    "llama_3_fixed": (LLAMA_3.replace("ROLE", "assistant"), "A2<|eot_id|>", "A1<|eot_id|>A2<|eot_id|>"),
}
ALIASES = {"vicuna_v1": "v1", "llava_v0": "v0", "mistral_direct": "chatml_direct"}


def conversation(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def turns(*texts, images=0, **options):
    return parse_turns(conversation(*texts), images, sample="s1", **options).turns


def text(spans, learned_only=False):
    return "".join(span.text for span in spans if span.learn or not learned_only)


TWO_ROUNDS = ("<image>\nQ1", "A1", "Q2", "A2")


@pytest.mark.parametrize("name", GOLDEN)
def test_documented_strings(name):
    prompt, answer, learned = GOLDEN[name]
    assert text(render(name, turns(*TWO_ROUNDS[:3], images=1), add_generation_prompt=True)) == prompt
    sample = render(name, turns(*TWO_ROUNDS, images=1))
    assert text(sample) == prompt + answer
    assert text(sample, learned_only=True) == learned


@pytest.mark.parametrize("name", GOLDEN)
def test_one_round_is_the_start_of_two(name):
    prompt = GOLDEN[name][0]
    first = text(render(name, turns("<image>\nQ1", images=1), add_generation_prompt=True))
    assert prompt.startswith(first)
    assert prompt[len(first) :].lstrip().startswith("A1")


def test_plain():
    sample = turns("Describe <image> briefly.", "A1", images=1)
    assert text(render("plain", sample)) == "<image>A1\n"
    assert text(render("plain", sample), learned_only=True) == "A1\n"
    assert text(render("plain", sample[:1], add_generation_prompt=True)) == "<image>"


def test_every_template_is_covered_here():
    assert set(TEMPLATES) == {*GOLDEN, *ALIASES, "plain"}
    for alias, name in ALIASES.items():
        assert TEMPLATES[alias] is TEMPLATES[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_special_tokens_are_spans_of_their_own_and_people_cannot_write_them(name):
    template = get_template(name)
    typed = " ".join(template.specials) or "@@"
    spans = render(name, turns(f"Q{typed}", f"A{typed}"))
    for span in spans:
        assert span.special == (span.text in template.specials)
    assert sum(typed in span.text and not span.special for span in spans) == 2


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("vicuna-v1", "vicuna_v1"), ("llama3", "llama_3"), ("Plain", "plain")]
)
def test_unknown_template_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=rf"unknown template '{wrong}'; did you mean '{nearest}'"):
        render(wrong, turns("Q", "A"))


def test_first_turn_not_from_a_human_is_dropped_and_counted():
    raw = [{"from": "gpt", "value": "Hello."}, *conversation("Q", "A")]
    parsed = parse_turns(raw, 0, sample="s1")
    assert parsed.dropped == 1
    assert parsed.turns == turns("Q", "A")
    assert parse_turns(raw[1:], 0, sample="s1").dropped == 0


def test_placeholders_stay_where_they_were_written():
    sample = turns("Compare <image> with <image>.", "A1", "And <image>?", "A2", images=3)
    assert sample[0].parts == ("Compare ", " with ", ".")
    spans = render("v1", sample)
    assert [span.image for span in spans].count(True) == 3
    assert "USER: Compare <image> with <image>. ASSISTANT: A1</s>USER: And <image>? ASS" in text(spans)
    assert not any(span.learn for span in spans if span.image)


@pytest.mark.parametrize(
    ("written", "moved"),
    [
        ("What is <image> this?", "<image>\nWhat is  this?"),
        ("Compare <image> and <image>", "<image>\nCompare  and"),
        ("<image>\nQ1", "<image>\nQ1"),
        ("Q1\n<image>", "<image>\nQ1"),
        ("<image>", "<image>"),
    ],
)
def test_llava_moves_the_placeholder_to_the_front(written, moved):
    by_definition = (IMAGE + "\n" + written.replace(IMAGE, "").strip()).strip()
    assert moved == by_definition
    spans = render("mistral_instruct", turns(written, "A", images=1, compat="llava"))
    assert text(spans) == f"[INST] {moved} [/INST] A </s>"


def test_llava_reads_the_placeholder_as_text_without_an_image():
    (question, _) = turns("Is <image> a tag?", "Yes.", compat="llava")
    assert question == Turn("human", ("Is <image> a tag?",))
    assert [span for span in render("v1", [question]) if span.image] == []


@pytest.mark.parametrize(
    ("raw", "images", "message"),
    [
        ([], 0, "not a non-empty list"),
        ("Q", 0, "not a non-empty list"),
        ([{"from": "human"}], 0, "turn 0 is not an object with the strings"),
        ([{"from": "human", "value": 3}], 0, "turn 0 is not an object with the strings"),
        ([{"from": "gpt", "value": "A"}], 0, "no turn from 'human'"),
        (
            conversation("Q", "A") + conversation("Q")[:0] + conversation("", "A")[1:],
            0,
            "turn 2 is from 'gpt'",
        ),
        ([*conversation("Q"), *conversation("Q")], 0, "turn 1 is from 'human' where 'gpt' is due"),
        ([*conversation("Q"), {"from": "bard", "value": "A"}], 0, "turn 1 is from 'bard'"),
        ([*conversation("Q", "A")[::-1], *conversation("Q", "A")], 0, "turn 2 is from 'human'"),
        (conversation("Q", ""), 0, r"turn 1 \(answer\) is empty"),
        (conversation("Q", " \n"), 0, r"turn 1 \(answer\) is empty"),
        (conversation(" ", "A"), 0, r"turn 0 \(question\) is empty"),
        (conversation("Q", "A"), 1, r"has 0 <image> placeholder\(s\) but 1 image\(s\)"),
        (conversation("<image> <image>", "A"), 1, r"has 2 <image> placeholder\(s\) but 1 image\(s\)"),
        (conversation("<image>", "A"), 0, r"has 1 <image> placeholder\(s\) but 0 image\(s\)"),
        (conversation("Q", "<image> A"), 1, "turn 1 is an answer and holds <image>"),
    ],
)
def test_bad_conversations_name_the_sample(raw, images, message):
    with pytest.raises(SampleError, match=f"^sample 'coco/7': .*{message}") as error:
        parse_turns(raw, images, sample="coco/7")
    assert error.value.sample == "coco/7"


def test_unknown_compat():
    with pytest.raises(ValueError, match="'llava'"):
        turns("Q", "A", compat="LLaVA")


@pytest.mark.parametrize(
    ("name", "sample", "options", "message"),
    [
        ("plain", turns("<image>", "A", "Q", "A", images=1), {}, "takes 2 turn"),
        ("plain", turns("Q", "A"), {}, "needs an image"),
        ("plain", turns("<image>", "A", images=1), {"add_generation_prompt": True}, "end with a human turn"),
        ("v1", turns("Q", "A"), {"add_generation_prompt": True}, "end with a human turn"),
        ("v1", [], {"add_generation_prompt": True}, "end with a human turn"),
    ],
)
def test_what_a_template_cannot_render(name, sample, options, message):
    with pytest.raises(SampleError, match=f"^sample 'x': .*{message}"):
        render(name, sample, sample="x", **options)


def test_errors_survive_the_way_from_a_worker_process():
    error = copy.copy(SampleError("x", "is odd"))  # by way of __reduce__, as pickling
    assert (str(error), error.sample, error.problem) == ("sample 'x': is odd", "x", "is odd")


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda t: t.strip() and IMAGE not in t)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.sampled_from(sorted(GOLDEN)))
def test_only_answers_are_learned_and_nothing_is_lost(rounds, name):
    template = TEMPLATES[name]
    spans = render(name, turns(*(part for pair in rounds for part in pair)))
    learned = "".join(template.answer_lead + answer + template.answer_close for _, answer in rounds)
    assert text(spans, learned_only=True) == learned
    opening = template.answer_open
    whole = "".join(
        (template.user_open if i else template.first_open)
        + question
        + template.user_close
        + opening
        + template.answer_lead
        + answer
        + template.answer_close
        for i, (question, answer) in enumerate(rounds)
    )
    assert text(spans) == whole
    assert all(isinstance(span, Span) and span.text for span in spans)


WITH_SYSTEM = [name for name, template in TEMPLATES.items() if template.system is not None]


def test_which_templates_have_a_place_for_a_system_text():
    assert set(TEMPLATES) - set(WITH_SYSTEM) == {"plain", "mini", "mistral_instruct"}
    for name in WITH_SYSTEM:
        before, after = TEMPLATES[name].system
        default = TEMPLATES[name].first_open.removeprefix(before).removesuffix(after)
        assert default[0] + default[-1] in ("A.", "Y.")  # a sentence and nothing else


@pytest.mark.parametrize("name", WITH_SYSTEM)
@pytest.mark.parametrize("compat", [None, "llava"])
def test_a_samples_own_system_text_takes_the_place_of_the_templates(name, compat):
    raw = [
        {"from": "system", "value": "Speak </s> like <|im_end|> a pirate."},
        *conversation("Q1", "A1", "Q2", "A2"),
    ]
    parsed = parse_turns(raw, 0, sample="s", compat=compat)
    assert parsed.dropped == 0
    spans = render(name, parsed.turns)
    plain = render(name, parsed.turns[1:])
    before, after = TEMPLATES[name].system
    default = TEMPLATES[name].first_open.removeprefix(before).removesuffix(after)
    assert text(spans) == text(plain).replace(default, "Speak </s> like <|im_end|> a pirate.", 1)
    assert "".join(s.text for s in spans if s.learn) == "".join(s.text for s in plain if s.learn)
    assert not any(s.special and "pirate" in s.text for s in spans)


@pytest.mark.parametrize("name", ["plain", "mini", "mistral_instruct"])
def test_a_system_turn_without_a_place_is_refused(name):
    raw = [{"from": "system", "value": "Speak."}, *conversation("<image>", "A1")]
    with pytest.raises(SampleError, match="sample 's7': has a system turn, but the template has no place"):
        render(name, parse_turns(raw, 1, sample="s7").turns, sample="s7")


@pytest.mark.parametrize(
    ("first", "message"),
    [("", "turn 0 .system turn. is empty"), ("See <image>", "turn 0 .system turn. holds <image>")],
)
def test_system_turns_that_cannot_be_used(first, message):
    with pytest.raises(SampleError, match=message):
        parse_turns([{"from": "system", "value": first}, *conversation("Q", "A")], 0, sample="s")
    with pytest.raises(SampleError, match="no turn from 'human'"):
        parse_turns([{"from": "system", "value": "Only this."}], 0, sample="s")
    middle = [*conversation("Q", "A"), {"from": "system", "value": "Now."}, *conversation("Q", "A")]
    with pytest.raises(SampleError, match="turn 2 is from 'system'"):
        parse_turns(middle, 0, sample="s")
