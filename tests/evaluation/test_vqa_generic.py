import json

import pytest

from mllm_jax.evaluation.benchmarks import get_benchmark


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_exact_match_and_majority(tmp_path):
    gold = [{"question_id": i, "answer": a} for i, a in enumerate(["yes", "no", "yes", "two"])]
    said = [{"question_id": i, "text": t} for i, t in enumerate(["Yes.", "maybe", "", "2"])]
    result = get_benchmark("vqa").score(_write(tmp_path / "p", said), _write(tmp_path / "a", gold))
    assert result["score"] == 0.5
    assert result["unparsed"] == 1
    assert result["majority_answer"] == "yes"
    assert result["majority_baseline"] == 0.5
    assert result["problems"]["empty_answer"]["first"] == ["2"]


def test_incomplete_file_has_no_score(tmp_path):
    gold = _write(tmp_path / "a", [{"question_id": i, "answer": "x"} for i in range(8)])
    said = _write(tmp_path / "p", [{"question_id": 1, "text": "x"}, {"question_id": 99, "text": "x"}])
    result = get_benchmark("vqa").score(said, gold)
    assert result["score"] is None
    assert result["problems"]["missing"] == {"count": 7, "first": ["0", "2", "3", "4", "5"]}
    assert result["problems"]["unknown"]["count"] == 1


def test_needs_annotations_and_refuses_unknown_options(tmp_path):
    said = _write(tmp_path / "p", [{"question_id": 1, "text": "x"}])
    with pytest.raises(ValueError, match="--annotations is needed"):
        get_benchmark("vqa").score(said)
    with pytest.raises(ValueError, match="no option 'rule'"):
        get_benchmark("vqa").score(said, said, rule="x")
    with pytest.raises(ValueError, match="no benchmark 'vqq'"):
        get_benchmark("vqq")
