import pytest
from scoring_helpers import lines, one

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.scienceqa import parse_letter, right_lmms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("C. blue", "C"),
        ("LECTURE ... The answer is D.", "D"),
        ("The answer is D!", "D"),  # the full stop is not escaped upstream
        ("The answer is D", None),
        ("The answer is A. No, The answer is B.", None),
        ("b", None),
        ("A.", None),
        ("F", None),
        ("", None),
    ],
)
def test_parse(text, expected):
    assert parse_letter(text) == expected


def test_lmms_rule():
    assert [right_lmms(t, "B") for t in ("B", "B. dog", "B) dog", "b", "A")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_full_and_img(tmp_path):
    gold = {
        "1": {"answer": "A", "n_choices": 2, "has_image": True},
        "2": {"answer": "B", "n_choices": 2, "has_image": False},
        "3": {"answer": "A", "n_choices": 2, "has_image": False},
        "4": {"answer": "A", "n_choices": 2, "has_image": True},
    }
    said = [("1", "A"), ("2", "B. two"), ("3", "C"), ("4", "who knows")]
    path = lines(tmp_path / "p", [{"question_id": i, "text": t} for i, t in said])
    result = get_benchmark("scienceqa").score(path, one(tmp_path / "g", gold))
    assert (result["accuracy"], result["img_accuracy"]) == (50.0, 50.0)
    assert (result["unparsed"], result["letter_not_among_the_choices"]) == (1, 1)
    assert result["subtasks"] == {"IMG": 50.0, "TXT": 50.0}


def test_the_data_sets_own_file(tmp_path):
    gold = {
        "1": {"answer": 1, "choices": ["a", "b"], "image": "x.png", "split": "test"},
        "2": {"answer": 0, "choices": ["a", "b"], "image": None, "split": "train"},
    }
    path = lines(tmp_path / "p", [{"question_id": "1", "text": "B"}])
    result = get_benchmark("scienceqa").score(path, one(tmp_path / "g", gold))
    assert (result["n"], result["img_accuracy"]) == (1, 100.0)
