import pytest
from scoring_helpers import one

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.predictions import PredictionError


def test_blink_is_the_mean_over_tasks(tmp_path):
    gold = {"val_Jigsaw_1": "(A)", "val_Jigsaw_2": "(B)", "val_IQ_Test_1": "(C)"}
    said = {"val_Jigsaw_1": "(A)", "val_Jigsaw_2": "(B) right", "val_IQ_Test_1": "(C)"}
    result = get_benchmark("blink").score(one(tmp_path / "p", said), one(tmp_path / "g", gold))
    assert result["subtasks"] == {"Jigsaw": 0.5, "IQ_Test": 1.0}
    assert result["score"] == 0.75
    assert result["micro_accuracy"] == 2 / 3
    assert result["unparsed"] == 1
    del said["val_IQ_Test_1"]
    assert get_benchmark("blink").score(one(tmp_path / "p", said), tmp_path / "g")["score"] is None
    with pytest.raises(PredictionError, match="no task name"):
        get_benchmark("blink").score(one(tmp_path / "p", {"x": "(A)"}), one(tmp_path / "g", {"x": "(A)"}))


CSV = """video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
v1,9,6,4,why,1,0,CW,run,sit,jump,walk,eat
v1,9,6,4,before,0,1,TP,run,sit,jump,walk,eat
v2,9,6,4,what,3,0,DO,run,sit,jump,walk,eat
"""


def test_nextqa_merges_previous_into_next(tmp_path):
    (tmp_path / "val.csv").write_text(CSV)
    said = {"v1_0": {"prediction": 1, "answer": 1}, "v1_1": {"prediction": 2}, "v2_0": {"prediction": "walk"}}
    result = get_benchmark("nextqa").score(one(tmp_path / "p", said), tmp_path / "val.csv")
    assert result["subtasks"] == {"CW": 100.0, "TN": 0.0, "DO": 100.0}
    assert result["question_groups"] == {"Acc_C": 100.0, "Acc_T": 0.0, "Acc_D": 100.0}
    assert result["score"] == 100 * 2 / 3
    rows = [
        {"question_id": "v1_0", "text": "B"},
        {"question_id": "v1_1", "text": "?"},
        {"question_id": "v2_0", "text": 3},
    ]
    result = get_benchmark("nextqa").score(one(tmp_path / "p", rows), tmp_path / "val.csv")
    assert result["correct"] == 2
    assert result["unparsed"] == 1
