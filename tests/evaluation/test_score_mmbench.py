import openpyxl
import pytest
from scoring_helpers import lines

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.mmbench import options_of
from mllm_jax.evaluation.option_match import infer_option
from mllm_jax.evaluation.predictions import PredictionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("B. dog", "B"),
        ("The answer is (C).", "C"),
        ("It is a dog", "B"),
        ("A dog is here now ok", "B"),
        ("A or B", None),
        ("cat and dog", None),
        ("B)", "B"),
        ("answer: D.", "D"),
        ("The answer is **C** because it has the most of all", "C"),
        ("I can't process this file.", "Z"),
        ("Z", "Z"),
        ("", None),
    ],
)
def test_golden_letters(text, expected):
    assert infer_option(text, {"A": "cat", "B": "dog", "C": "100", "D": "1000"}) == expected


def _question(base, said, answer="cat", options=("cat", "dog", "cow"), rotate=3, **more):
    rows = []
    for turn in range(rotate):
        turned = options[turn:] + options[:turn]
        row = {"index": base + turn * 1_000_000, "question": "?", "prediction": said[turn]}
        row |= dict(zip("ABCD", (*turned, None, None), strict=False))
        rows.append({**row, "answer": "ABCD"[turned.index(answer)], **more})
    return rows


def test_circular(tmp_path):
    rows = _question(1, "ACB") + _question(2, "AAA") + _question(7, "BBB")
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows))
    assert result["evaluation"] == "circular"
    assert (result["n"], result["correct"], result["score"]) == (3, 1, 1 / 3)
    assert result["vanilla_accuracy"] == 2 / 3
    assert (result["rows"], result["row_correct"]) == (9, 5)


def test_a_missing_rotation_is_found_without_annotations(tmp_path):
    rows = _question(1, "ACB") + _question(2, "ACB")[:2]
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows))
    assert result["score"] is None
    assert result["problems"]["missing"]["first"] == ["index 2000002"]
    assert result["partial"]["n" if "n" in result["partial"] else "answered"] == 1


def test_an_option_that_keeps_its_place_has_one_rotation_fewer(tmp_path):
    rows = []
    for turn, turned in enumerate((("cat", "dog", "none of these"), ("dog", "cat", "none of these"))):
        row = {"index": 5 + turn * 1_000_000, "prediction": "A", "answer": "AB"[turn]}
        rows.append(row | dict(zip("ABC", turned, strict=True)))
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows))
    assert (result["complete"], result["score"], result["row_accuracy"]) == (True, 0.0, 0.5)


TSV = """index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit
1\t"two
lines"\tnan\tcat\tdog\tcow\t\tA\timage_scene\t\tx\tcoarse_perception\t\tdev
2\twhat\tnan\tcat\tdog\tcow\t\tA\tocr\t\tx\tfinegrained_perception (instance-level)\t\tdev
"""


def test_annotations_of_base_rows_with_categories(tmp_path):
    (tmp_path / "g.tsv").write_text(TSV)
    rows = _question(1, "ACB") + _question(2, "AAA") + _question(3, "AAA")
    result = get_benchmark("mmbench").score(lines(tmp_path / "p", rows), tmp_path / "g.tsv")
    assert result["subtasks"] == {"image_scene": 1.0, "ocr": 0.0}
    assert result["groups"] == {"coarse": 1.0, "fine": 0.0}
    assert result["l2_counts"]["coarse_perception"] == [1, 1]
    assert result["problems"]["unknown"]["count"] == 3


def test_llava_answer_file_without_rotations_is_vanilla(tmp_path):
    (tmp_path / "g.tsv").write_text(TSV)
    rows = [
        {
            "question_id": 1,
            "round_id": 0,
            "text": "A",
            "options": ["cat", "dog", "cow"],
            "option_char": list("ABC"),
        },
        {
            "question_id": 2,
            "round_id": 0,
            "text": "the dog",
            "options": ["cat", "dog", "cow"],
            "option_char": list("ABC"),
        },
    ]
    result = get_benchmark("mmbench_cn").score(lines(tmp_path / "p", rows), tmp_path / "g.tsv")
    assert result["benchmark"] == "mmbench_cn"
    assert result["evaluation"].startswith("vanilla")
    assert result["score"] == 0.5


def test_submission_xlsx(tmp_path):
    book = openpyxl.Workbook()
    table = (("index", "A", "B", "prediction", "answer"), (1, "cat", "dog", "the cat", "A"))
    for row in (*table, (1_000_001.0, "dog", "cat", "the cat", "B", "no column")):
        book.active.append(row)
    book.save(tmp_path / "p.xlsx")
    result = get_benchmark("mmbench").score(tmp_path / "p.xlsx")
    assert (result["score"], result["row_correct"]) == (1.0, 2)
    (tmp_path / "p.xlsx").write_bytes(b"PK")
    with pytest.raises(PredictionError, match="no readable XLSX"):
        get_benchmark("mmbench").score(tmp_path / "p.xlsx")


def test_options_end_at_the_first_absent_one():
    assert options_of({"A": "x", "B": float("nan"), "C": "y"}) == {"A": "x"}
