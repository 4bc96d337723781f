import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.evaluation.edit_distance import anls_lmms, anls_m4c, most_similar
from mllm_jax.evaluation.vqa_normalize import CONTRACTIONS, m4c_normalize, soft_accuracy, vqa_punctuation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("two dogs", "2 dogs"),
        ("1,000", "1000"),
        ("5 , 000", "5 000"),
        ("3.5", "3.5"),
        ("$3.50!", "$3.50"),
        ("dont know", "don't know"),
        ("Bob's car", "bob 's car"),
        ("A", ""),
        ("an apple a day", "apple day"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("U.S.A.", "usa"),
        ("Mr. Smith", "mr smith"),
        ("ten", "10"),
        ("twenty", "twenty"),
        ("None", "0"),
        ("12:30", "12:30"),
        ("half-time", "half time"),
        ("100%", "100%"),
        ("1,000 people - total", "1000 people total"),
        ("(left)", "left"),
        ("whats", "what's"),
        ("it's", "it 's"),
        ("3.", "3"),
        ("a.b", "ab"),
    ],
)
def test_golden_values(text, expected):
    assert m4c_normalize(text) == expected


def test_contraction_table():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["couldntve" if "couldntve" in CONTRACTIONS else "couldnt've"] == "couldn't've"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert CONTRACTIONS["twas"] == "'twas"


def test_only_32_full_stops_are_removed():
    assert vqa_punctuation("." * 40) == "." * 8


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_closed_form(matches, score):
    human = ["yes"] * matches + [f"other{i}" for i in range(10 - matches)]
    assert soft_accuracy("yes", human) == pytest.approx(score)


def test_soft_accuracy_needs_answers():
    with pytest.raises(ValueError, match="at least one"):
        soft_accuracy("yes", [])


def test_edit_distances():
    assert most_similar("dogs", ["cat", "dog", "dig"]) == 1
    assert most_similar("x", ["aa", "bb"]) == 0
    assert anls_m4c("abcd", ["abcx", "zzzz"]) == 0.75
    assert anls_m4c("ab", ["xb"]) == 0.5
    assert anls_m4c("ab", ["xyz"]) == 0.0
    assert anls_m4c("", [""]) is None
    assert anls_lmms("a  b", ["a b"]) == 1.0
    assert anls_lmms("", [""]) == 1.0
    with pytest.raises(ValueError, match="no choices"):
        most_similar("a", [])


@settings(deadline=None)
@given(st.text())
def test_normalising_never_crashes(text):
    once = m4c_normalize(text)
    assert once == once.strip()
    assert 0 <= soft_accuracy(once, [once] * 10) <= 1
