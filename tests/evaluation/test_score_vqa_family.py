import pytest
from scoring_helpers import lines, one

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.textvqa import question_of
from mllm_jax.evaluation.benchmarks.vqav2 import score_question

TEN = ["dog"] * 3 + ["two dogs"] * 7


@pytest.mark.parametrize(
    ("answer", "human", "expected"),
    [
        ("The dog.", ["dog"] * 9 + ["puppy"], 1.0),
        ("The dog.", ["dog"] * 10, 0.0),  # nothing is normalised if all agree
        ("dog", ["dog"] * 10, 1.0),
        ("2 dogs", TEN, 1.0),
        ("dog\n", TEN, 0.9),
        ("none", ["none"] * 4 + ["0"] * 6, 1.0),
    ],
)
def test_vqav2_question(answer, human, expected):
    assert score_question(answer, human) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["vqav2", "ok_vqa"])
def test_vqav2_file(tmp_path, name):
    annotations = [
        {
            "question_id": i,
            "answer_type": kind,
            "question_type": "what is",
            "answers": [{"answer": a, "answer_id": j} for j, a in enumerate(human)],
        }
        for i, kind, human in ((1, "other", TEN), (2, "yes/no", ["yes"] * 10))
    ]
    gold = one(tmp_path / "g", {"annotations": annotations})
    said = one(tmp_path / "p", [{"question_id": 2, "answer": "Yes"}, {"question_id": 1, "answer": "a dog"}])
    result = get_benchmark(name).score(said, gold)
    assert result["benchmark"] == name
    assert result["subtasks"] == {"other": 90.0, "yes/no": 0.0}
    assert (result["score"], result["score_always_normalised"]) == (45.0, 95.0)
    assert result["per_question_type"] == {"what is": 45.0}


def test_textvqa(tmp_path):
    data = [
        {"question_id": 7, "image_id": "img", "question": "what brand?", "answers": ["nokia"] * 2 + ["x"] * 8}
    ]
    gold = one(tmp_path / "g", {"data": data})
    ours = lines(tmp_path / "p", [{"question_id": 7, "text": "Nokia."}])
    # LLaVA's own file: the id is the picture's, the question is in the prompt.
    prompt = "What brand?\nReference OCR token: nokia\nAnswer the question using a single word or phrase."
    llava = lines(tmp_path / "q", [{"question_id": "img", "prompt": prompt, "text": "Nokia."}])
    for path in (ours, llava):
        result = get_benchmark("textvqa").score(path, gold)
        assert result["score"] == pytest.approx(60)
        assert result["anls"]["m4c_STVQAAccuracy"] == 1.0
        assert result["anls"]["m4c_STVQAANLS"] == pytest.approx(5 / 6)
    other = lines(tmp_path / "r", [{"question_id": "img", "prompt": "Which one?\nAnswer", "text": "Nokia"}])
    result = get_benchmark("textvqa").score(other, gold)
    assert result["problems"]["unknown"]["first"] == ["img / 'which one?'"]


def test_question_of():
    assert question_of("Reference OCR token: A\nWhat?\nAnswer") == "what?"
    assert question_of("What?\nAnswer") == "what?"


def test_vizwiz_upload_and_llava_file(tmp_path):
    answers = [{"answer": a, "answer_confidence": "yes"} for a in ["unanswerable"] * 7 + ["The cat"] * 3]
    gold = one(
        tmp_path / "g", [{"image": "a.jpg", "question_id": 3, "answers": answers, "answer_type": "other"}]
    )
    for row, score in (
        ({"image": "a.jpg", "answer": "Unanswerable"}, 100),
        ({"question_id": 3, "text": "cat"}, 90),
    ):
        result = get_benchmark("vizwiz").score(one(tmp_path / "p", [row]), gold)
        assert result["score"] == pytest.approx(score)
        assert result["subtasks"] == {"other": result["score"]}
    assert result["said_unanswerable"] == 0


def test_gqa(tmp_path):
    gold = {
        "1": {"answer": "left", "isBalanced": True, "types": {"structural": "choose", "semantic": "rel"}},
        "2": {"answer": "t-shirt", "isBalanced": True, "types": {"structural": "query", "semantic": "obj"}},
        "3": {"answer": "no", "isBalanced": False, "types": {"structural": "verify", "semantic": "rel"}},
    }
    path = one(tmp_path / "g", gold)
    said = lines(
        tmp_path / "p", [{"question_id": "1", "text": "Left."}, {"question_id": "2", "text": "tshirt"}]
    )
    result = get_benchmark("gqa").score(said, path)
    assert (result["n"], result["score"], result["lmms_exact_match"]) == (2, 50.0, 100.0)
    assert result["answer_kinds"] == {"binary": 100.0, "open": 0.0}
    said = one(
        tmp_path / "p",
        [{"questionId": "1", "prediction": "left"}, {"questionId": "2", "prediction": "t-shirt"}],
    )
    assert get_benchmark("gqa").score(said, path)["score"] == 100.0
