"""Arbitrary answers never crash a scorer and never score above the number of questions."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scoring_helpers import lines, one

from mllm_jax.evaluation import caption_java
from mllm_jax.evaluation.benchmarks import BENCHMARKS
from mllm_jax.evaluation.benchmarks.mme import TASKS

CHOICES = {"A": "cat", "B": "dog"}
ANSWERS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "A",
            "(B)",
            "yes",
            "no",
            "The answer is A.",
            "cat",
            "[0.1, 0.2, 0.3, 0.4]",
            "8 9",
            "1e999",
            "nan",
            "{",
        ]
    ),
    st.text(alphabet="AB ().,:;%[]{}'\"0123456789-eE\n\tisyno", max_size=30),
)


def _rows(texts, key="text", **rest):
    return [{"question_id": i, key: text, **rest} for i, text in enumerate(texts)]


def _map(texts, prefix="val_Art_"):
    return {f"{prefix}{i + 1}": text for i, text in enumerate(texts)}


def _gold(texts, **rest):
    return [{"question_id": i, **rest} for i in range(len(texts))]


def _mmbench(d, texts):
    rows = [{"index": i, "prediction": t, "answer": "A", **CHOICES} for i, t in enumerate(texts)]
    return lines(d / "p", rows), None


def _mme(d, texts):
    (d / "g").mkdir(exist_ok=True)
    for task in TASKS:
        (d / "g" / f"{task}.txt").write_text("1.jpg\tIs it?\tYes\n1.jpg\tIs it not?\tNo\n")
    said = [texts[i % len(texts)] for i in range(2 * len(TASKS))]
    rows = [
        {"question_id": f"{task}/1.jpg", "prompt": question, "text": said[2 * i + j]}
        for i, task in enumerate(TASKS)
        for j, question in enumerate(("Is it?", "Is it not?"))
    ]
    return lines(d / "p", rows), d / "g"


def _nextqa(d, texts):
    head = "video,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    body = "".join(f"v,why,0,{i},CW,cat,dog,cow,hen,ant\n" for i in range(len(texts)))
    (d / "g.csv").write_text(head + body)
    return one(d / "p", {f"v_{i}": {"prediction": text} for i, text in enumerate(texts)}), d / "g.csv"


def _video_chatgpt(d, texts):
    for aspect in ("correctness", "detail", "context", "temporal", "consistency"):
        rows = [{"id": i, "content": text} for i, text in enumerate((*texts, "{'score': 3}"))]
        lines(d / "p" / f"{aspect}.jsonl", rows)
    return d / "p", None


def _vqa_gold(texts, **rest):
    answers = [{"answer": "cat"}] * 5 + [{"answer": "a dog"}] * 5
    return [{"question_id": i, "answers": answers, **rest} for i in range(len(texts))]


PRO = {"subject": "Art", "options": ["cat", "dog"], "answer": "A"}
VISTA = {
    "question_type": "free_form",
    "answer_type": "float",
    "precision": 1,
    "choices": None,
    "answer": "1.2",
}
Q_BENCH = {"question": "?", "candidates": ["cat", "dog"], "correct_ans": "cat"}
BOX = {"bbox": [0, 0, 5, 5], "width": 10, "height": 10}

FILES = {
    "blink": lambda d, t: (one(d / "p", _map(t)), one(d / "g", _map(["(A)"] * len(t)))),
    "captions": lambda d, t: (
        lines(d / "p", _rows(t)),
        one(d / "g", {str(i): ["a cat", "one cat"] for i in range(len(t))}),
    ),
    "chartqa": lambda d, t: (lines(d / "p", _rows(t)), lines(d / "g", _gold(t, label="10"))),
    "gqa": lambda d, t: (lines(d / "p", _rows(t)), lines(d / "g", _gold(t, answer="cat"))),
    "llava_bench": lambda d, t: (lines(d / "p", _rows([*t, "9 9"], "content", category="c")), None),
    "mathvista": lambda d, t: (lines(d / "p", _rows(t, "response", **VISTA)), None),
    "mini": lambda d, t: (
        lines(d / "p", _rows(t, ability="a", group="fine", options=["cat", "dog"], answer="cat")),
        None,
    ),
    "mm_vet": lambda d, t: (
        one(d / "p", {"v1_0": [0.5], **{f"v1_{i + 1}": [text] for i, text in enumerate(t)}}),
        one(d / "g", {f"v1_{i}": ["ocr"] for i in range(len(t) + 1)}),
    ),
    "mmbench": _mmbench,
    "mme": _mme,
    "mmmu": lambda d, t: (
        lines(
            d / "p",
            [{"id": f"test_Art_{i}", "response": text, "index2ans": CHOICES} for i, text in enumerate(t)],
        ),
        one(
            d / "g",
            {
                f"test_Art_{i}": {"question_type": ("multiple-choice", "open")[i % 2], "ground_truth": "A"}
                for i in range(len(t))
            },
        ),
    ),
    "mmmu_pro": lambda d, t: (lines(d / "p", _rows(t, "response", **PRO)), None),
    "msvd_qa": lambda d, t: (lines(d / "p", _rows([*t, "{'pred': 'yes', 'score': 3}"], "content")), None),
    "nextqa": _nextqa,
    "pope": lambda d, t: (lines(d / "p", _rows(t)), lines(d / "g", _gold(t, label="yes"))),
    "q_bench": lambda d, t: (
        lines(d / "p", [{"img_path": str(i), "response": text, **Q_BENCH} for i, text in enumerate(t)]),
        None,
    ),
    "refcoco": lambda d, t: (lines(d / "p", _rows(t)), lines(d / "g", _gold(t, **BOX))),
    "scienceqa": lambda d, t: (
        lines(d / "p", _rows(t)),
        one(d / "g", {str(i): {"answer": "A", "n_choices": 2, "has_image": True} for i in range(len(t))}),
    ),
    "seed_bench": lambda d, t: (
        lines(d / "p", _rows(t)),
        lines(d / "g", _gold(t, question_type_id=1, answer="A")),
    ),
    "textvqa": lambda d, t: (
        lines(d / "p", _rows(t)),
        one(d / "g", {"data": _gold(t, image_id="x", question="?", answers=["cat"] * 5 + ["dog"] * 5)}),
    ),
    "video_chatgpt": _video_chatgpt,
    "vizwiz": lambda d, t: (lines(d / "p", _rows(t)), lines(d / "g", _vqa_gold(t, image="a"))),
    "vqa": lambda d, t: (lines(d / "p", _rows(t)), lines(d / "g", _gold(t, answer="cat"))),
    "vqav2": lambda d, t: (lines(d / "p", _rows(t)), one(d / "g", {"annotations": _vqa_gold(t)})),
}
# The same code under another name.
SAME = {
    "ccbench": "mmbench",
    "mmbench_cn": "mmbench",
    "mmmu_pro_vision": "mmmu_pro",
    "q_bench_zh": "q_bench",
    "ok_vqa": "vqav2",
    "relaxed_accuracy": "chartqa",
    "msrvtt_qa": "msvd_qa",
    "activitynet_qa": "msvd_qa",
    "tgif_qa": "msvd_qa",
    "mini_video": "mini",
    "refcoco+": "refcoco",
    "refcocog": "refcoco",
    "refcoco_caption": "captions",
    "refcoco+_caption": "captions",
    "refcocog_caption": "captions",
}
# LLaVA-Bench is relative to the reference's scores, CIDEr goes to 10.
HIGHEST = {"fraction": 1.0, "percent": 100.0, "points": 2000.0}
FREE = {"llava_bench": float("inf"), "captions": 10.0, "video_chatgpt": 5.0}


def test_every_benchmark_is_fuzzed():
    # Q-Bench A3's answers are numbers; see test_score_mutations.py.
    assert set(FILES) | set(SAME) | {"q_bench_a3"} == {
        name for name, one in BENCHMARKS.items() if not one.not_scored
    }


@pytest.mark.parametrize("name", sorted(FILES))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(ANSWERS, min_size=2, max_size=4))
def test_fuzz(tmp_path, monkeypatch, name, texts):
    monkeypatch.setattr(caption_java, "missing", lambda: "not in the fuzz test")
    if name == "vizwiz":
        texts = texts[:1]
    result = BENCHMARKS[name].score(*FILES[name](tmp_path, texts))
    json.dumps(result)
    score = result["score"] if result["complete"] else result["partial"]["score"]
    assert 0 <= score <= FREE.get(name, HIGHEST[result["unit"]])
    assert result["unparsed"] <= max(result["n"], 2 * len(TASKS))
