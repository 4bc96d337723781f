"""The mini world's captions and questions: right, unique, balanced, answerable from the caption."""

from collections import Counter, defaultdict

import mini_world_oracle as oracle
import numpy as np
import pytest

from mllm_jax.mini.world import (
    ABILITIES,
    GROUPS,
    Question,
    long_caption,
    make_questions,
    prompt_choice,
    prompt_open,
    rotations,
    sample_scene,
    short_caption,
    text_sample,
    vocabulary,
)
from mllm_jax.mini.world.questions import TEMPLATES
from mllm_jax.mini.world.text import CONTINUE
from mllm_jax.mini.world.vocabulary import words


@pytest.fixture(scope="module")
def asked():
    """(scene, questions) of many scenes."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(21, i, "finetune") for i in range(1200)]
    return [(scene, make_questions(scene, rng)) for scene in scenes]


def test_twelve_abilities_four_per_group():
    assert Counter(a.group for a in ABILITIES.values()) == dict.fromkeys(GROUPS, 4)
    assert len({a.axis for a in ABILITIES.values()}) == 12


def test_every_answer_is_right_and_unique_by_an_independent_reading(asked):
    forms = set()
    for scene, questions in asked:
        facts = oracle.facts_of_scene(scene)
        for question in questions:
            assert oracle.answer(question.text, facts) == question.answer, (question, scene)
            forms.add(question.form)
    assert forms == set(TEMPLATES)


def test_the_long_caption_holds_every_answer(asked):
    rng = np.random.default_rng(1)
    for scene, questions in asked[:400]:
        caption = long_caption(scene, rng)
        facts = oracle.facts_of_caption(caption)
        for question in questions:
            assert oracle.answer(question.text, facts) == question.answer, (question, caption)


def test_options_are_distinct_and_hold_the_answer(asked):
    for _, questions in asked:
        for q in questions:
            assert len(set(q.options)) == len(q.options)
            assert q.answer in q.options
            assert 1 <= len(q.answer.split()) <= 2
            few = {"lighting": 3, "majority": 3, "size": 2}
            assert len(q.options) == few.get(q.form, 4)


def test_neither_answers_nor_options_give_much_away(asked):
    answers, places, shown = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    for _, questions in asked:
        for q in questions:
            answers[q.ability][q.answer] += 1
            places[len(q.options)][q.options.index(q.answer)] += 1
            # how often the middle one of numeric options is right
            if q.options[0].isdigit():
                order = sorted(q.options, key=int)
                shown[q.form][order.index(q.answer)] += 1
    assert set(answers) == set(ABILITIES)
    for ability, counts in answers.items():
        assert max(counts.values()) / counts.total() < 0.5, (ability, counts)
    for n, counts in places.items():
        assert max(counts.values()) / counts.total() < 1 / n + 0.04
    for form in ("sum", "difference", "read_digit", "bar_value"):
        counts = shown[form]
        assert max(counts.values()) / counts.total() < 0.45, (form, counts)


def test_questions_are_reproducible():
    scene = sample_scene(0, 5, "mini")
    first, again = (make_questions(scene, np.random.default_rng(4)) for _ in range(2))
    assert first == again
    other = make_questions(scene, np.random.default_rng(5))
    assert first != other


def test_prompts():
    q = Question("attribute", "what color is the star?", "red", ("blue", "red", "teal"), "color")
    assert prompt_open(q) == "what color is the star?\nAnswer the question using a single word or phrase."
    assert prompt_choice(q) == (
        "what color is the star?\nA. blue\nB. red\nC. teal\nAnswer with one of the options."
    )
    assert "A. red\nB. teal\nC. blue" in prompt_choice(q, rotations(q.options)[1])
    assert rotations(["a", "b", "c"]) == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")]


def test_captions_are_lower_case_with_single_spaces(asked):
    rng = np.random.default_rng(2)
    texts = {}
    for scene, _ in asked[:120]:
        for caption in (long_caption(scene, rng), short_caption(scene, rng)):
            assert caption == " ".join(caption.lower().split())
        assert long_caption(scene) == long_caption(scene)
        texts.setdefault(scene, {long_caption(scene, np.random.default_rng(i)) for i in range(12)})
        for thing in scene.of_kind("shape", "digit", "word"):
            assert thing.position in long_caption(scene)
    assert np.mean([len(t) for t in texts.values()]) > 4  # several phrasings


def test_text_samples_start_with_a_description_and_answer_rightly():
    kinds = Counter()
    for index in range(250):
        turns = text_sample(9, index)
        assert turns == text_sample(9, index)
        human, _ = turns[0]
        if human.startswith(CONTINUE):
            kinds["continue"] += 1
            assert len(turns) == 1
            continue
        caption = human.split("\n", 1)[0]
        facts = oracle.facts_of_caption(caption)
        asked = [human.split("\n", 1)[1], *(h for h, _ in turns[1:])]
        for prompt, (_, answer) in zip(asked, turns, strict=True):
            text = prompt.split("\n", 1)[0]
            assert oracle.answer(text, facts) == answer
            kinds["choice" if "\nA. " in prompt else "open"] += 1
            if "\nA. " in prompt:
                assert f". {answer}\n" in prompt
    assert min(kinds.values()) > 25
    assert len(kinds) == 3


def test_vocabulary_is_closed_and_small(asked):
    known = set(vocabulary())
    assert len(known) < 250
    used = set()
    for index in range(400):
        for turn in text_sample(1, index):
            used.update(words(turn[0]), words(turn[1]))
    for scene, _ in asked[:120]:
        used.update(words(short_caption(scene)))
    assert used <= known
    assert len(known - used) < 12
