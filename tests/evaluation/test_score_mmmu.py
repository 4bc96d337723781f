import random

import pytest
from scoring_helpers import lines, one

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.mmmu_parse import find_choice, normalize, open_is_right, parse_open
from mllm_jax.evaluation.benchmarks.mmmu_pro import find_choice as find_choice_pro

OPTIONS = {"A": "cat", "B": "dog", "C": "blue horse", "D": "tea"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I think (A) but maybe (C)", "C"),
        ("A B", "B"),
        ("B.", "B"),
        ("(D)", "D"),
        ("well I am sure that it is the BLUE HORSE", "C"),
        ("the dog", None),  # too short for option texts
        ("", None),
    ],
)
def test_choices(text, expected):
    assert find_choice(text, OPTIONS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The result is 36 watts.", {"36 watts", 36.0}),
        ("x = 5", {5.0}),
        ("The answer is 1,234.567", {1234.0, 1234.57, 234.57}),
        ("so it is about 3e5", {"about 3e5", 300000.0, 5.0}),
    ],
)
def test_open_answers(text, expected):
    assert set(parse_open(text)) == expected


def test_open_scoring():
    assert normalize("C") == [" c", "c "]
    assert open_is_right(parse_open("it is option c"), "C")
    assert not open_is_right(parse_open("nice"), "C")
    assert open_is_right(parse_open("about 1/64 of it"), "1/64")
    assert open_is_right(parse_open("The length is 2.004 m"), "2")
    assert not open_is_right(parse_open("20"), "2")
    assert open_is_right(parse_open("a trans isomer"), ["cis", "trans"])


def test_random_fallback_is_drawn_with_the_official_seed(tmp_path):
    gold = {
        f"validation_Art_{i}": {"question_type": "multiple-choice", "ground_truth": "A"} for i in range(1, 9)
    }
    rows = [{"id": key, "all_choices": list("ABCD"), "index2ans": OPTIONS, "response": "?"} for key in gold]
    result = get_benchmark("mmmu").score(lines(tmp_path / "p", reversed(rows)), one(tmp_path / "g", gold))
    draw = random.Random(42)
    assert result["correct"] == sum(draw.choice(list("ABCD")) == "A" for _ in gold)
    assert result["random_fallbacks"] == result["unparsed"] == 8
    assert result["correct_not_counting_fallback"] == 0
    assert result["fallback_ids"] == list(gold)


def test_final_answers_and_domains(tmp_path):
    gold = {
        "validation_Art_Theory_1": {"question_type": "multiple-choice", "ground_truth": "A"},
        "validation_Math_1": {"question_type": "short-answer", "ground_truth": "36"},
        "validation_Math_2": {"question_type": "multiple-choice", "ground_truth": "B"},
    }
    said = {
        "validation_Art_Theory_1": "A",
        "validation_Math_1": "The result is 36 watts.",
        "validation_Math_2": "b",
    }
    result = get_benchmark("mmmu").score(one(tmp_path / "p", said), one(tmp_path / "g", gold))
    assert result["subtasks"] == {"Art_Theory": 1.0, "Math": 0.5}
    assert result["domains"]["Science"] == 0.5
    assert result["domain_counts"]["Art and Design"] == [1, 1]
    assert result["unparsed"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So (A). Answer: D", "D"),
        ("Answer: A or B\nAnswer: C.", "C"),
        ("(B)", "B"),
        ("B. dog", "B"),
        ("x", None),
        ("I would say it must be the blue horse", "C"),
    ],
)
def test_pro_choices(text, expected):
    assert find_choice_pro(text, OPTIONS) == expected


def test_pro_counts_fallbacks_as_wrong(tmp_path):
    base = {"subject": "Art", "options": ["w", "x", "y", "z"], "answer": "A"}
    rows = [
        {"id": "1", "response": "A", **base},
        {"id": "2", "response": "?", **base, "options": str(base["options"])},
    ]
    result = get_benchmark("mmmu_pro").score(lines(tmp_path / "p", rows))
    assert result["score"] == 50.0
    assert result["expected_score_with_random_fallbacks"] == 100 * 1.25 / 2
    assert result["unparsed"] == 1
