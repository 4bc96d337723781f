import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scoring_helpers import lines

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.option_match import match_option


@pytest.fixture
def score_mini(tmp_path):
    """Scores rows as a file of answers."""

    def score(rows):
        return get_benchmark("mini").score(lines(tmp_path / "rows.jsonl", rows))

    return score


def _row(question_id, text, answer, options=(), rotation=0, ability="color", group="fine"):
    return {
        "question_id": question_id,
        "rotation": rotation,
        "ability": ability,
        "group": group,
        "options": list(options),
        "answer": answer,
        "text": text,
    }


def _rows(question, texts, ability="color", group="fine", options=("red", "blue"), answer="red"):
    return [
        _row(question, text, answer, options[turn:] + options[:turn], turn, ability, group)
        for turn, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("Red.", ["red", "blue"], (0, "option_text")),
        ("B", ["red", "blue"], (1, "letter")),
        ("(b)", ["red", "blue"], (1, "letter")),
        ("B. red", ["red", "blue"], (1, "letter")),
        ("The answer is (B).", ["red", "blue"], (1, "letter")),
        ("the answer is a blue ball", ["red", "blue"], (1, "contained_text")),
        ("A blue ball", ["red", "blue"], (1, "contained_text")),
        ("red and blue", ["red", "blue"], (None, "unparsed")),
        ("dark red", ["red", "dark red"], (1, "option_text")),
        ("a dark red ball", ["red", "dark red"], (1, "contained_text")),
        ("reddish", ["red", "blue"], (None, "unparsed")),
        ("C", ["red", "blue"], (None, "unparsed")),
        ("", ["red", "blue"], (None, "unparsed")),
        ("3", ["3", "13"], (0, "option_text")),
        ("there are 13", ["3", "13"], (1, "contained_text")),
        ("A", ["B", "A"], (1, "option_text")),
    ],
)
def test_match_option(text, options, expected):
    assert match_option(text, options) == expected


def test_circular_and_groups(score_mini):
    rows = (
        _rows(1, ["red", "red"])
        + _rows(2, ["A", "A"])  # right, then wrong after the rotation
        + _rows(3, ["A", "B"], ability="count", group="fine")
        + _rows(4, ["nothing", "red"], ability="scene", group="coarse")
    )
    result = score_mini(rows)
    assert result["complete"]
    assert result["n"] == 4
    assert result["score"] == 0.5
    assert result["subtasks"] == {"color": 0.5, "count": 1.0, "scene": 0.0}
    assert result["groups"] == {"coarse": 0.0, "fine": 0.75}
    assert result["micro_groups"] == {"coarse": 0.0, "fine": 2 / 3}
    assert result["vanilla"] == 0.75
    assert result["row_accuracy"] == 6 / 8
    assert result["unparsed"] == 1
    assert result["parsed"] == {"option_text": 3, "letter": 4, "unparsed": 1}


def test_open_rows_and_letters_as_answers(score_mini):
    rows = [
        _row("a", "a.", "A"),
        _row("b", "2", "two"),
        _row("c", "the", "A"),
        _row("d", "", "A"),
        _row("e", "dog", "B", ("cat", "dog")),
    ]
    result = score_mini(rows)
    assert result["score"] == 3 / 5
    assert result["unparsed"] == 1
    assert result["problems"]["empty_answer"] == {"count": 1, "first": ["('d', 0)"]}


def test_missing_rotation_withholds_the_score(score_mini):
    result = score_mini(_rows(1, ["red", "red"]) + _rows(2, ["red"]))
    assert result["score"] is None
    assert not result["complete"]
    assert result["problems"]["missing"]["first"] == ["question 2 rotation 1"]
    assert result["partial"]["score"] == 1.0


def test_answer_that_is_no_option_names_the_question(score_mini):
    with pytest.raises(ValueError, match="question 'q7'"):
        score_mini(_rows("q7", ["red"], answer="green"))


def test_annotations_find_missing_rows(tmp_path):
    gold = _rows(1, ["", ""]) + _rows(2, ["", ""])
    answers = [{"question_id": 1, "rotation": r, "text": "red"} for r in (0, 1)]
    for name, rows in (("gold", gold), ("answers", answers)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = get_benchmark("mini").score(tmp_path / "answers", tmp_path / "gold")
    assert result["score"] is None
    assert result["problems"]["missing"]["count"] == 2
    assert result["partial"]["score"] == 1.0


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=6))
def test_fuzz_never_crashes_nor_exceeds_one(score_mini, texts):
    result = score_mini([row for i, pair in enumerate(texts) for row in _rows(i, pair)])
    assert 0 <= result["score"] <= 1
    assert sum(result["parsed"].values()) == 2 * len(texts)
