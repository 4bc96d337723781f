from scoring_helpers import lines, one

from mllm_jax.evaluation.benchmarks import get_benchmark

QUESTIONS = [
    {"question_id": 1, "question_type_id": 1, "data_type": "image", "answer": "A"},
    {"question_id": 2, "question_type_id": 5, "data_type": "image", "answer": "B"},
    {"question_id": 3, "question_type_id": 5, "data_type": "image", "answer": "B"},
    {"question_id": "v4", "question_type_id": 10, "data_type": "video", "answer": "C"},
]


def test_image_and_video_apart(tmp_path):
    said = [("1", "A"), ("2", " B. two"), ("3", "B"), ("v4", "D")]
    path = lines(tmp_path / "p", [{"question_id": i, "text": t} for i, t in said])
    gold = one(tmp_path / "g", {"questions": QUESTIONS, "question_type": {}})
    result = get_benchmark("seed_bench").score(path, gold)
    assert (result["n"], result["score"]) == (3, 2 / 3)
    assert result["video"] == {"n": 1, "correct": 0, "accuracy": 0.0}
    assert result["subtasks"] == {
        "Scene Understanding": 1.0,
        "Instances Counting": 0.5,
        "Action Recognition": 0.0,
    }
    assert result["groups"] == {"coarse": 1.0, "fine": 0.5}
    assert result["lmms_image_accuracy"] == 1.0
    assert result["unparsed"] == 1


def test_answers_inside_the_predictions(tmp_path):
    rows = [
        {"question_id": "1", "prediction": "A", "gt_answer": "A"},
        {"question_id": "v1", "prediction": "A", "gt_answer": "B"},
    ]
    result = get_benchmark("seed_bench").score(lines(tmp_path / "p", rows))
    assert (result["score"], result["all"]["accuracy"]) == (1.0, 0.5)
