import json

import pytest
from scoring_helpers import one

from mllm_jax.evaluation.benchmarks.mme import TASKS
from mllm_jax.evaluation.benchmarks.seed_bench import IMAGE
from mllm_jax.evaluation.grouping import DEFAULT_FILE, group_scores, grouped, load_groups

RADAR = {
    "coarse": {"image_quality", "image_scene", "image_style", "image_topic"},
    "fine": {"action_recognition", "celebrity_recognition", "object_localization", "ocr"},
    "reasoning": {
        "function_reasoning",
        "identity_reasoning",
        "social_relation",
        "structuralized_imagetext_understanding",
    },
}


def test_the_papers_twelve_are_verified_and_nothing_else():
    table = load_groups()
    verified = {}
    for benchmark, entries in table.items():
        for name, entry in entries.items():
            if entry.status == "verified":
                assert benchmark == "mmbench"
                verified.setdefault(entry.group, set()).add(name)
    assert verified == RADAR


def test_every_sub_task_has_a_group():
    table = load_groups()
    assert len(table["mmbench"]) == 20
    assert set(table["mme"]) == set(table["mme_authors"]) == set(TASKS)
    assert set(table["seed_bench"]) == set(IMAGE)


def test_aggregations():
    counts = {"image_scene": [9, 10], "image_topic": [0, 2], "ocr": [1, 2]}
    result = grouped("mmbench", counts)
    assert result["micro"] == {"coarse": 0.75, "fine": 0.5}
    assert result["macro"] == {"coarse": 0.45, "fine": 0.5}
    assert result["normalised"] == {"coarse": 45.0, "fine": 50.0}
    points = {"scene": 150.0, "artwork": 50.0, "count": 200.0}
    assert group_scores("mme", points, "sum") == {"coarse": 200.0, "fine": 200.0}
    assert group_scores("mme", points, "macro") == {"coarse": 100.0, "fine": 200.0}
    assert group_scores("mme", points, "normalised") == {"coarse": 50.0, "fine": 100.0}


def test_users_own_file(tmp_path):
    raw = json.loads(DEFAULT_FILE.read_text())
    raw["mmbench"]["ocr"] = {"group": "reading", "status": "proposed"}
    table = load_groups(one(tmp_path / "g.json", raw))
    assert group_scores("mmbench", {"ocr": 0.5}, "macro", table) == {"reading": 0.5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"group": "fine"}, "status"),
        ({"group": "fine", "status": "sure"}, "status"),
        ({"group": "fine", "status": "proposed", "x": 1}, "unknown keys"),
        ("fine", "needs a group"),
    ],
)
def test_damaged_files_name_the_entry(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message) as error:
        load_groups(one(tmp_path / "g.json", {"mmbench": {"ocr": entry}}))
    assert "'ocr'" in str(error.value)


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'ocr'"):
        group_scores("mmbench", {"ocrr": 1.0}, "macro")
    with pytest.raises(ValueError, match="no benchmark"):
        group_scores("mmbenchh", {}, "macro")
    with pytest.raises(ValueError, match="no aggregation"):
        group_scores("mmbench", {}, "median")
    with pytest.raises(ValueError, match="not a readable grouping"):
        load_groups(DEFAULT_FILE.with_name("absent.json"))
