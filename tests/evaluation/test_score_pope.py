import pytest
from scoring_helpers import lines

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.pope import parse_llava, says_neither, score_lmms
from mllm_jax.evaluation.predictions import PredictionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog", "no"),
        ("Yes. No", "yes"),
        ("NO", "yes"),  # only these three spellings, as upstream
        ("nothing", "yes"),
        ("", "yes"),
        ("No\nyes", "yes"),  # split at blanks only
    ],
)
def test_llava_rule(text, expected):
    assert parse_llava(text) == expected


def test_neither():
    assert [says_neither(t) for t in ("Yes", "no", "a dog", "")] == [False, False, True, True]


@pytest.fixture
def folder(tmp_path):
    number, questions = 0, []
    for split in ("adversarial", "popular", "random"):
        labels = []
        for i, label in enumerate(("yes", "no", "yes", "no")):
            number += 1
            text = f"Is there a thing {i}?"
            questions.append(
                {"question_id": number, "image": "a.jpg", "text": f"{text}\nAnswer ...", "category": split}
            )
            labels.append({"question_id": i + 1, "image": "a.jpg", "text": text, "label": label})
        lines(tmp_path / "data" / "coco" / f"coco_pope_{split}.json", labels)
    lines(tmp_path / "data" / "llava_pope_test.jsonl", questions)
    return tmp_path / "data"


def _said(texts):
    return [{"question_id": i + 1, "text": text} for i, text in enumerate(texts * 3)]


def test_three_splits(tmp_path, folder):
    answers = lines(tmp_path / "p", reversed(_said(["Yes", "No", "No", "Yes"])))
    result = get_benchmark("pope").score(answers, folder)
    cell = result["details"]["random"]
    assert (cell["TP"], cell["FP"], cell["TN"], cell["FN"]) == (1, 1, 1, 1)
    assert (cell["precision"], cell["recall"], cell["f1"], cell["yes_ratio"]) == (0.5, 0.5, 0.5, 0.5)
    assert result["score"] == result["mean_f1"] == 0.5
    assert get_benchmark("pope").score(answers, folder / "coco")["score"] == 0.5


def test_lmms_rule_and_its_yes_ratio_bug():
    figures = score_lmms(["yes", "no", "no", "no"], ["Yes", "No", "maybe not", "no "])
    assert figures["accuracy"] == 0.75
    assert figures["other"] == 1
    assert figures["yes_ratio"] == 0.25
    assert figures["yes_ratio_upstream"] == 0.25
    assert score_lmms(["yes", "no"], ["no", "no"])["yes_ratio_upstream"] == 0.5


def test_other_versions_of_a_split_are_refused(tmp_path, folder):
    labels = [{"question_id": 1, "image": "a.jpg", "text": "Is there a thing 0?", "label": "yes"}]
    lines(folder / "coco" / "coco_pope_random.json", labels)
    with pytest.raises(PredictionError, match="1 labels for 4 questions"):
        get_benchmark("pope").score(lines(tmp_path / "p", _said(["Yes"] * 4)), folder)
    lines(folder / "coco" / "coco_pope_random.json", labels * 4)
    with pytest.raises(PredictionError, match="is not question"):
        get_benchmark("pope").score(lines(tmp_path / "p", _said(["Yes"] * 4)), folder)


def test_one_file_with_labels(tmp_path):
    gold = lines(tmp_path / "g", [{"question_id": 1, "label": "yes"}, {"question_id": 2, "label": "no"}])
    said = lines(tmp_path / "p", [{"question_id": 1, "text": "yes"}, {"question_id": 2, "text": "no"}])
    assert get_benchmark("pope").score(said, gold)["details"]["all"]["f1"] == 1.0
