import json

import pytest
from scoring_helpers import lines, one

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.refcoco import center_inside, from_square, iou, parse_box
from mllm_jax.evaluation.benchmarks.relaxed_accuracy import is_right


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        ("14", "14", True),
        ("24.1", "23", True),
        ("24.2", "23", False),
        ("12%", "0.12", True),
        ("12", "0.12", False),
        ("0", "0", True),
        ("0.0", "0", False),  # a zero target must be equal as text
        ("Yes", "yes", True),
        ("-10", "10", False),
        ("", "3", False),
    ],
)
def test_five_percent(text, target, expected):
    assert is_right(text, target) is expected


def test_chartqa_splits(tmp_path):
    gold = [
        {"question_id": 1, "label": "10", "split": "human"},
        {"question_id": 2, "label": "blue", "split": "augmented"},
        {"question_id": 3, "label": "red", "split": "augmented"},
    ]
    said = [
        {"question_id": 1, "text": "10.5"},
        {"question_id": 2, "text": "Blue"},
        {"question_id": 3, "text": "x"},
    ]
    result = get_benchmark("chartqa").score(lines(tmp_path / "p", said), lines(tmp_path / "g", gold))
    assert result["subtasks"] == {"human": 1.0, "augmented": 0.5}
    assert (result["score"], result["mean_of_splits"]) == (2 / 3, 0.75)
    assert result["exact_match"] == 1 / 3
    rows = [{"pid": 1, "prediction": "1", "target": "1"}]
    assert get_benchmark("relaxed_accuracy").score(lines(tmp_path / "p", rows))["score"] == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.1, 0.2, 0.5, 1]", [0.1, 0.2, 0.5, 1.0]),
        ("box [ -1,2, 3,4 ] and [0,0,0,0]", [-1, 2, 3, 4]),
        ("[1e-2, 0, 0, 0]", None),
        ("[0.1, 0.2, 0.5]", None),
        ("(0.1, 0.2, 0.5, 1)", None),
    ],
)
def test_boxes(text, expected):
    assert parse_box(text) == expected


def test_iou_and_centre():
    assert iou([0, 0, 1, 1], [0, 0, 1, 1]) == 1.0
    assert iou([0, 0, 1, 1], [0.5, 0, 1.5, 1]) == pytest.approx(1 / 3)
    assert iou([0, 0, 1, 1], [1, 1, 0, 0]) == 0.0
    assert iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0.0
    assert center_inside([0, 0, 1, 1], [0.5, 0.5, 1.5, 1.5])
    assert not center_inside([0, 0, 1, 1], [0.6, 0.6, 1.6, 1.6])
    assert from_square([0.25, 0, 0.75, 1], 100, 200) == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_comprehension(tmp_path, name):
    gold = [
        {"question_id": 1, "bbox": [0, 0, 100, 50], "width": 200, "height": 100, "split": "testA"},
        {"question_id": 2, "bbox": [0, 0, 200, 100], "width": 200, "height": 100, "split": "testB"},
    ]
    said = [{"question_id": 1, "text": "[0.0, 0.0, 0.5, 0.5]"}, {"question_id": 2, "text": "no idea"}]
    result = get_benchmark(name).score(lines(tmp_path / "p", said), lines(tmp_path / "g", gold))
    assert result["subtasks"] == {"testA": 1.0, "testB": 0.0}
    assert (result["IoU"], result["ACC@0.5"], result["ACC@0.9"]) == (0.5, 0.5, 0.5)
    assert result["Center_ACC"] == 1.0  # [0, 0, 0, 0] has its centre on the border, as upstream
    assert result["unparsed"] == 1
    # On the padded square the same region is [0, 0.25, 0.5, 0.5].
    said[0]["text"] = "[0.0, 0.25, 0.5, 0.5]"
    result = get_benchmark(name).score(lines(tmp_path / "p", said), tmp_path / "g")
    assert result["padded_square"]["IoU"] == 0.5
    assert result["IoU"] < 0.5


def test_q_bench(tmp_path):
    items = [
        {
            "img_path": "a.jpg",
            "question": "How is it?",
            "candidates": ["Good", "Bad"],
            "correct_ans": "Bad",
            "type": 2,
            "concern": 0,
        },
        {
            "img_path": "b.jpg",
            "question": "How is it?",
            "candidates": ["Good", "Bad"],
            "correct_ans": "Good",
            "type": 2,
            "concern": 1,
        },
    ]
    said = "".join(
        json.dumps({**item, "response": text}) for item, text in zip(items, ("B. Bad", "Bad."), strict=True)
    )
    (tmp_path / "p").write_text(said)
    result = get_benchmark("q_bench").score(tmp_path / "p", one(tmp_path / "g", items))
    assert (result["n"], result["score"]) == (2, 0.5)
    assert result["subtasks"] == {"type 2": 0.5, "concern 0": 1.0, "concern 1": 0.0}
    assert get_benchmark("q_bench_zh").score(tmp_path / "p")["score"] == 0.5
