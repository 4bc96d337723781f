import json
import math
import re

from mllm_jax.evaluation.benchmarks import BENCHMARKS
from mllm_jax.evaluation.reproduce import _Layout, _layouts, check_rows
from mllm_jax.evaluation.reproduce_rows import READINGS


def test_official_figures_are_found_by_pattern_or_by_the_same_name():
    names = {"domains>(.+)>num": r"counts>\1>1", "all|some": r"runs>*>\g<0>", "gone": "counts>Art>7"}
    result = {"counts": {"Art": [1, 2]}, "runs": {"first": {"all": {"n": [3, 4]}}}, "n": 7, "list": [1]}
    expected = {"domains": {"Art": {"num": 2}}, "all": {"n": [3, 5]}, "n": 7, "absent": 1, "list": [1, 2]}
    found = {name: pair for name, *pair in _Layout("n", names).pairs(expected, result)}
    assert math.isnan(found.pop("absent")[1])
    wanted, ours = found.pop("list")  # of another length
    assert (wanted, math.isnan(ours)) == (2.0, True)
    assert found == {"domains.Art.num": [2, 2], "all.n[0]": [3, 3], "all.n[1]": [5, 4], "n": [7, 7]}
    ((_, _, beyond),) = _Layout("n", names).pairs({"gone": 1}, result)
    assert math.isnan(beyond)


def test_the_table_of_official_figures_names_benchmarks_and_patterns():
    layouts = _layouts()
    assert set(READINGS) <= set(layouts) <= set(BENCHMARKS)
    for pattern in (p for rows in layouts.values() for row in rows for p in (row.entry, *row.names)):
        re.compile(pattern)


def test_rows_that_cannot_be_compared_leave_the_others(tmp_path):
    """Captions without the official tokens have no readings; what is wrong in one folder is said."""
    rows = {
        "captions/coco_predictions.json": [{"image_id": 1, "caption": "a cat"}],
        "captions/coco_references.json": {"1": ["a cat"]},
        "captions/expected.json": {"coco": {"CIDEr": 0.0}},
        "mmmu_pro/expected.json": {"none": {"x": 1}},
        "relaxed_accuracy/expected.json": {"chart": {"accuracy": 1.0}},
    }
    for name, value in rows.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value))
    row = {"pid": "1", "prediction": "7", "target": "7", "relaxed_correct": True}
    (tmp_path / "relaxed_accuracy" / "chart.jsonl").write_text(json.dumps(row))
    done, failed = check_rows(tmp_path)
    assert [(one.benchmark, one.expected, one.obtained) for one in done] == [("relaxed_accuracy", 1, 1)]
    assert len(failed) == 1
    assert "mmmu_pro" in failed[0]
    del row["relaxed_correct"]
    (tmp_path / "relaxed_accuracy" / "chart.jsonl").write_text(json.dumps(row))
    done, failed = check_rows(tmp_path)
    assert not done
    assert "relaxed_correct" in failed[1]
