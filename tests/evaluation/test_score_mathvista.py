import pytest
from scoring_helpers import lines, one

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.mathvista import normalize, quick_extraction

CHOICE = {
    "question_type": "multi_choice",
    "answer_type": "text",
    "choices": ["cat", "dog"],
    "precision": None,
}
INTEGER = {"question_type": "free_form", "answer_type": "integer", "choices": None, "precision": None}
FLOAT = {"question_type": "free_form", "answer_type": "float", "choices": None, "precision": 1.0}
LIST = {"question_type": "free_form", "answer_type": "list", "choices": None, "precision": None}


@pytest.mark.parametrize(
    ("extraction", "item", "expected"),
    [
        ("(b) something", CHOICE, "dog"),
        ("B", CHOICE, "dog"),
        ("b", CHOICE, "cat"),  # no letter: the first of two equally distant options
        ("dogs", CHOICE, "dog"),
        (None, CHOICE, "cat"),
        ("3.0", INTEGER, "3"),
        ("three", INTEGER, None),
        ("inf", INTEGER, None),
        ("1.26", FLOAT, "1.3"),
        ("x", FLOAT, None),
        ([1, 2], LIST, "[1, 2]"),
    ],
)
def test_normalize(extraction, item, expected):
    assert normalize(extraction, item) == expected


def test_integers_as_in_2023():
    assert normalize("3.0", INTEGER, integers_by_float=False) is None
    assert normalize("3", INTEGER, integers_by_float=False) == "3"


def test_quick_extraction():
    assert quick_extraction("", INTEGER) == ""
    assert quick_extraction("dog", CHOICE) == "dog"
    assert quick_extraction(" 7", INTEGER) == "7"
    assert quick_extraction("the dog", CHOICE) is None
    assert quick_extraction("about 7", FLOAT) is None


def _item(pid, item, answer, **rest):
    metadata = {"task": "counting", "skills": ["a", "b"], "grade": "college"}
    return {"pid": pid, **item, "answer": answer, "metadata": metadata, **rest}


def test_scores_and_breakdown(tmp_path):
    rows = [
        _item("1", INTEGER, "3", extraction="3.0"),
        _item("2", CHOICE, "dog", extraction="(B)"),
        _item("3", FLOAT, "1.2", response="1.2"),
        _item("4", INTEGER, "5", response="it is five"),
    ]
    result = get_benchmark("mathvista").score(lines(tmp_path / "p", rows))
    assert result["score"] == 0.75
    assert result["correct_with_integers_read_as_in_the_2023_table"] == 2
    assert result["without_extraction"] == 1
    assert result["breakdown"]["answer_type"]["integer"] == {"accuracy": 0.5, "correct": 1, "total": 2}
    assert result["breakdown"]["skills"]["b"]["total"] == 4
    official = {row.pop("pid"): row for row in rows}
    assert get_benchmark("mathvista").score(one(tmp_path / "p", official))["score"] == 0.75
