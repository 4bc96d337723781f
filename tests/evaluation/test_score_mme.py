import pytest
from scoring_helpers import lines

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.mme import TASKS, parse_yes_no, parse_yes_no_lmms, score_task
from mllm_jax.evaluation.predictions import PredictionError


@pytest.fixture
def truth(tmp_path):
    folder = tmp_path / "truth"
    folder.mkdir()
    for task in TASKS:
        rows = [
            "1.jpg\tIs it red? Please answer yes or no.\tYes",
            "1.jpg\tIs it blue?  Please answer yes or no.\tNo",
        ]
        (folder / f"{task}.txt").write_text("\n".join(rows) + "\n")
    return folder


def _answers(said=("Yes", "No")):
    rows = []
    for task in TASKS:
        for question, text in zip(("Is it red?", "Is it blue?"), said, strict=True):
            prompt = f"{question}\nAnswer the question using a single word or phrase."
            rows.append({"question_id": f"{task}/images/1.jpg", "prompt": prompt, "text": text})
    return rows


@pytest.mark.parametrize(
    ("text", "official", "lmms"),
    [
        ("Yes", "yes", "yes"),
        ("yes, it is", "yes", "yes"),
        ("No.", "no", "no"),
        ("know", "no", "no"),
        ("a cat", "other", "other"),
        ("    yes", "other", "yes"),
        (" no", "no", "no"),
        ("it is yes", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_parse(text, official, lmms):
    assert (parse_yes_no(text), parse_yes_no_lmms(text)) == (official, lmms)


def test_task_score_counts_questions_and_pictures():
    cell = score_task([("yes", "yes"), ("no", "no"), ("yes", "yes"), ("no", "other")])
    assert cell["acc"] == 0.75
    assert cell["acc_plus"] == 0.5
    assert cell["score"] == 125.0
    assert (cell["TP"], cell["TN"], cell["other_num"], cell["recall"]) == (2, 1, 1, 1.0)


def test_perfect_answers_have_full_points(tmp_path, truth):
    rows = _answers()
    result = get_benchmark("mme").score(lines(tmp_path / "p", reversed(rows)), truth)
    assert (result["perception"], result["cognition"], result["total"]) == (2000, 800, 2800)
    assert result["score"] == 2000
    assert result["groups"] == {"coarse": 400, "fine": 1600, "reasoning": 800}
    assert result["group_normalised"] == {"coarse": 100, "fine": 100, "reasoning": 100}
    assert result["group_authors"]["cognition"] == 800


def test_official_text_files_give_the_same(tmp_path, truth):
    folder = tmp_path / "said"
    folder.mkdir()
    for task in TASKS:
        text = (
            (truth / f"{task}.txt")
            .read_text()
            .replace("\tYes", "\tYes\tyes it is")
            .replace("\tNo", "\tNo\tYes")
        )
        (folder / f"{task}.txt").write_text(text)
    result = get_benchmark("mme").score(folder)
    assert result["perception"] == 500  # half of the questions, no picture
    jsonl = get_benchmark("mme").score(lines(tmp_path / "p", _answers(("Yes", "Yes"))), truth)
    assert jsonl["perception"] == 500
    (folder / "OCR.txt").write_text("1.jpg\tIs it red? Please answer yes or no.\tYes\n")
    damaged = get_benchmark("mme").score(folder, truth)
    assert damaged["score"] is None


def test_missing_and_damaged(tmp_path, truth):
    result = get_benchmark("mme").score(lines(tmp_path / "p", _answers()[:-1]), truth)
    assert result["score"] is None
    assert result["problems"]["missing"]["count"] == 1
    (truth / "count.txt").unlink()
    with pytest.raises(PredictionError, match=r"count\.txt: missing"):
        get_benchmark("mme").score(lines(tmp_path / "p", _answers()), truth)
    with pytest.raises(ValueError, match="annotations"):
        get_benchmark("mme").score(tmp_path / "p")
