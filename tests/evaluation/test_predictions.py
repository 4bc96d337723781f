import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    by_id,
    match_ids,
    read_annotations,
    read_json,
    read_rows,
    score_result,
)

ROWS = [{"question_id": 1, "text": "é"}, {"question_id": 2, "text": "b"}]


@pytest.mark.parametrize(
    "text",
    [
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
        json.dumps(ROWS),
        "".join(json.dumps(row) for row in ROWS),  # Q-Bench: no separators
        "\n\n".join(json.dumps(row, indent=2) for row in ROWS),
        json.dumps(ROWS[0]) + json.dumps(ROWS[1]) + "\n",
    ],
)
def test_every_layout_gives_the_same_rows(tmp_path, text):
    path = tmp_path / "p"
    path.write_text(text, encoding="utf-8")
    problems = Problems()
    assert read_rows(path, problems) == ROWS
    assert problems.as_dict() == {}


def test_line_separators_inside_strings_do_not_split_a_line(tmp_path):
    path = tmp_path / "p"
    row = {"question_id": 1, "text": "a\u2028b\x85c"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert read_rows(path, Problems()) == [row, row]


def test_encodings_are_read_or_reported(tmp_path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    for encoding, kind in (("utf-8-sig", "byte_order_mark"), ("utf-16", "wrong_encoding")):
        (tmp_path / encoding).write_text(text, encoding=encoding)
        problems = Problems()
        assert read_rows(tmp_path / encoding, problems) == ROWS
        assert problems.counts == {kind: 1}
    (tmp_path / "latin").write_bytes(text.encode("latin-1"))
    problems = Problems()
    assert read_rows(tmp_path / "latin", problems) == ROWS[1:]  # the damaged line is not scored
    assert problems.first["wrong_encoding"][0].startswith("latin line 1")
    (tmp_path / "array").write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("latin-1"))
    assert read_rows(tmp_path / "array", Problems()) == ROWS[1:]
    (tmp_path / "map").write_bytes(json.dumps({"a": "é", "b": "x"}, ensure_ascii=False).encode("latin-1"))
    assert read_json(tmp_path / "map", Problems()) == {"b": "x"}


def test_replacement_characters_that_were_written_as_such_are_kept(tmp_path):
    rows = [{"question_id": 1, "text": "\ufffd"}]
    (tmp_path / "p").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    problems = Problems()
    assert read_rows(tmp_path / "p", problems) == rows
    assert problems.as_dict() == {}


def test_half_written_line_is_named(tmp_path):
    path = tmp_path / "p"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1])[:-4])
    problems = Problems()
    assert read_rows(path, problems) == ROWS[:1]
    assert problems.counts == {"unreadable_line": 1}
    assert "line 2" in problems.first["unreadable_line"][0]


def test_an_array_that_breaks_off_keeps_its_whole_rows(tmp_path):
    path = tmp_path / "p"
    path.write_text(json.dumps(ROWS, indent=1)[:-8])
    problems = Problems()
    assert read_rows(path, problems) == ROWS[:1]
    assert problems.first == {"unreadable_line": ["p: the JSON array breaks off after 1 rows"]}
    path.write_text('{"a": 1, "b"')
    with pytest.raises(PredictionError, match="half-written"):
        read_json(path, Problems())


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(PredictionError, match="no such file"):
        read_json(tmp_path / "absent", Problems())
    (tmp_path / "p").write_text("not json")
    with pytest.raises(PredictionError, match="no JSON found"):
        read_json(tmp_path / "p", Problems())
    (tmp_path / "p").write_text("[1, 2]")
    with pytest.raises(PredictionError, match="no row is a JSON object"):
        read_rows(tmp_path / "p", Problems())
    (tmp_path / "p").write_text('{"a": 1}\n{"a":\n{"a": 2}\n')
    with pytest.raises(PredictionError, match="unreadable line"):
        read_annotations(tmp_path / "p")


def test_ids_are_matched_and_every_problem_counted():
    rows = [
        {"id": 1, "text": "a"},
        {"id": 1, "text": "a"},
        {"id": 2, "text": "a"},
        {"id": 2, "text": "b"},
        {"id": 3, "text": " "},
        {"id": 9, "text": "a"},
    ]
    problems = Problems()
    found = match_ids(rows, [1, 2, 3, 4], lambda r: r["id"], lambda r: r["text"], problems)
    assert list(found) == [1, 2, 3]
    assert found[2]["text"] == "b"
    assert problems.counts == {
        "duplicate": 1,
        "conflicting_duplicate": 1,
        "empty_answer": 1,
        "unknown": 1,
        "missing": 1,
    }
    assert problems.blocking


def test_only_the_first_offenders_are_listed():
    problems = Problems()
    for i in range(20):
        problems.add("missing", i)
    assert problems.as_dict() == {"missing": {"count": 20, "first": ["0", "1", "2", "3", "4"]}}


def test_incomplete_results_have_no_score():
    problems = Problems()
    kwargs = {"n": 3, "unparsed": 0, "score": 0.5, "unit": "fraction", "subtasks": {"a": 1.0}, "groups": {}}
    whole = score_result("x", **kwargs, problems=problems, extra=7)
    assert (whole["score"], whole["extra"], whole["complete"]) == (0.5, 7, True)
    problems.add("missing", 4)
    part = score_result("x", **kwargs, problems=problems, extra=7)
    assert (part["score"], part["subtasks"], part["complete"]) == (None, {}, False)
    assert "extra" not in part
    assert part["partial"]["score"] == 0.5
    assert part["partial"]["answered"] == 3


def test_annotation_ids_must_be_unique(tmp_path):
    with pytest.raises(PredictionError, match="'1' occurs twice"):
        by_id([{"id": 1}, {"id": "1"}], ("id",), tmp_path)
    with pytest.raises(PredictionError, match="none of the keys"):
        by_id([{"x": 1}], ("id",), tmp_path)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("bytes") / "p"
    path.write_bytes(raw)
    try:
        rows = read_rows(path, Problems())
    except PredictionError:
        return
    assert all(isinstance(row, dict) for row in rows)
