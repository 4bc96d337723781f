import pytest
from scoring_helpers import lines, one

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.llava_bench import parse_review
from mllm_jax.evaluation.benchmarks.video_judgements import parse_judgement, read_score, read_verdict
from mllm_jax.evaluation.predictions import PredictionError


def test_mm_vet(tmp_path):
    gold = one(tmp_path / "g", {"v1_0": {"capability": ["ocr", "math"]}, "v1_1": {"capability": ["ocr"]}})
    result = get_benchmark("mm_vet").score(
        one(tmp_path / "p", {"v1_0": [0.0, 0.5], "v1_1": {"score": [1.0, 1.0]}}), gold
    )
    assert result["runs_total"] == [50.0, 75.0]
    assert (result["score"], result["std"]) == (62.5, 12.5)
    assert result["subtasks"] == {"ocr": 62.5, "math": 25.0}
    assert result["per_combination"] == {"math+ocr": 25.0, "ocr": 100.0}
    bad = get_benchmark("mm_vet").score(one(tmp_path / "p", {"v1_0": [0.0], "v1_1": [2.0]}), gold)
    assert bad["score"] is None
    with pytest.raises(PredictionError, match="these are answers"):
        get_benchmark("mm_vet").score(one(tmp_path / "p", {"v1_0": "five", "v1_1": "six"}), gold)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 6.5\nwell", (8.0, 6.5)),
        ("8, 7", (8.0, 7.0)),
        ("8 7 6", (-1.0, -1.0)),
        ("Scores: 8 7", (-1.0, -1.0)),
        ("nan 7", (-1.0, -1.0)),
        ("", (-1.0, -1.0)),
    ],
)
def test_reviews(text, expected):
    assert parse_review(text) == expected


def test_llava_bench_runs(tmp_path):
    def run(name, pairs):
        rows = [
            {"question_id": i, "category": f"llava_bench_{kind}", "content": f"{a} {b}\nbecause"}
            for i, (kind, a, b) in enumerate(pairs)
        ]
        return lines(tmp_path / "runs" / name, rows)

    first = run("a.jsonl", [("conv", 8, 4), ("detail", 9, 9), ("conv", 7, 7)])
    result = get_benchmark("llava_bench").score(first)
    assert result["score"] == pytest.approx(100 * 6.667 / 8)
    assert result["runs"]["a"]["all"]["official_printout"] == [83.3, 80.0, 66.7]
    assert result["runs"]["a"]["all"]["relative_without_rounding"] == pytest.approx(100 * 20 / 24)
    run("b.jsonl", [("conv", 8, 8), ("detail", 9, 9), ("conv", "x", 7)])
    both = get_benchmark("llava_bench").score(tmp_path / "runs")
    assert both["unparsed"] == 1
    assert both["runs"]["b"]["all"]["relative_without_unparsed"] == 100.0
    assert both["score"] == pytest.approx((100 * 6.667 / 8 + 100 * 5.333 / 5.333) / 2)
    run("b.jsonl", [("conv", 8, 8)])
    assert get_benchmark("llava_bench").score(tmp_path / "runs")["score"] is None


def test_stored_scores_that_differ_are_reported(tmp_path):
    row = {"question_id": 1, "category": "c", "content": "8 4\n", "tuple": [8, 5]}
    result = get_benchmark("llava_bench").score(lines(tmp_path / "p", [row]))
    assert result["score"] == 62.5
    assert result["problems"]["stored_scores_differ_from_the_review"]["count"] == 1


@pytest.mark.parametrize(
    ("text", "verdict", "score"),
    [
        ("{'pred': 'yes', 'score': 4}", "yes", 4),
        ('Sure: {"pred": "No.", "score": "2"} done', "no", 2),
        ("{'pred': 'maybe', 'score': 3.9}", None, 3),
        ("{'score': 7}", None, None),
        ("yes, 4", None, None),
        ("{'pred': __import__('os')}", None, None),
    ],
)
def test_judgements(text, verdict, score):
    judgement = parse_judgement(text)
    assert (read_verdict(judgement), read_score(judgement)) == (verdict, score)


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa", "activitynet_qa"])
def test_video_qa(tmp_path, name):
    official = {
        "v_1": [{"pred": "yes", "score": 4}, {"q": "?"}],
        "v_2": [{"pred": "no", "score": 1}, {"q": "?"}],
        "v_3": [{"pred": "unclear", "score": 1}, {"q": "?"}],
    }
    result = get_benchmark(name).score(one(tmp_path / "p", official))
    assert (result["score"], result["average_score"], result["unparsed"]) == (0.5, 2.0, 1)
    rows = [
        {"id": "v_1", "content": "{'pred': 'yes', 'score': 5}", "model": "m-1"},
        {"id": "v_2", "content": "?"},
    ]
    result = get_benchmark(name).score(lines(tmp_path / "p", rows))
    assert result["score"] is None
    assert result["partial"]["judge_models"] == ["m-1"]


def test_video_chatgpt(tmp_path):
    for i, aspect in enumerate(("correctness", "detail", "context", "temporal", "consistency")):
        one(tmp_path / "d" / f"{aspect}.json", {"a": [{"score": i}, {}], "b": [{"score": 1}, {}]})
    result = get_benchmark("video_chatgpt").score(tmp_path / "d")
    assert result["subtasks"] == {"CI": 0.5, "DO": 1.0, "CU": 1.5, "TU": 2.0, "CO": 2.5}
    assert result["score"] == 1.5
    (tmp_path / "qa.json").write_text("[]")  # the right answers are in the judgements
    assert get_benchmark("video_chatgpt").score(tmp_path / "d", tmp_path / "qa.json") == result
    (tmp_path / "d" / "temporal.json").unlink()
    assert get_benchmark("video_chatgpt").score(tmp_path / "d")["score"] is None
