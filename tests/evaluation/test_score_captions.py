import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_helpers import one

from mllm_jax.evaluation import caption_java
from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.caption_metrics import bleu, cider, rouge_l
from mllm_jax.evaluation.ptb_tokenizer import PUNCTUATION, tokenize, tokens

SAID = ["a man rides a red horse", "two dogs play in the snow", "a plate of food"]
REFERENCES = [
    ["a man is riding a horse", "a person on a brown horse"],
    ["two dogs playing in the snow", "dogs play outside in winter", "two animals"],
    ["a plate with food on it", "food"],
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A half-eaten sandwich; it isn't the dog's.", "a half-eaten sandwich it is n't the dog 's"),
        ("People can't wait, they're late!", "people ca n't wait they 're late"),
        ("The sign says 'STOP' (in red).", "the sign says stop -lrb- in red -rrb-"),
        ("W 122 St., at 6:55 p.m. and 1,000 more", "w 122 st. at 6:55 p.m. and 1,000 more"),
        ("and/or 50/50 T-shirts", "and/or 50/50 t-shirts"),
        ("cannot gonna", "can not gon na"),
        ("a $5 bill, 50% off #1", "a $ 5 bill 50 % off # 1"),
        ("wait... what?! -- ok", "wait what ?! ok"),
        ("carriage.on the street", "carriage.on the street"),
        ("a\nb", "a b"),
        ("", ""),
    ],
)
def test_tokens(text, expected):
    assert tokenize([text]) == [expected]


def test_an_initial_before_a_new_sentence_loses_its_full_stop():
    assert tokenize(["It is plan B.", "The cat"])[0] == "it is plan b"
    assert tokenize(["It is plan B.", "cats"])[0] == "it is plan b."


def test_metrics_of_equal_captions():
    assert bleu(SAID, [[s] for s in SAID]) == pytest.approx([1, 1, 1, 1])
    assert rouge_l("a cat", ["a cat", "x"]) == pytest.approx(1)
    assert cider(SAID, [[s] for s in SAID]) == pytest.approx([10, 10, 10])


def test_metrics_by_hand():
    # 2 of 3 words, 1 of 2 bigrams; as long as the closest reference.
    assert bleu(["the red cat"], [["the red dog"]])[:2] == pytest.approx([2 / 3, (2 / 3 * 1 / 2) ** 0.5])
    # Brevity: 2 words against 4.
    assert bleu(["a b"], [["a b c d"]])[0] == pytest.approx(2.718281828 ** (1 - 2), rel=1e-6)
    assert rouge_l("a b c", ["a x c"]) == pytest.approx(2 / 3)
    assert rouge_l("", ["a"]) == 0.0
    assert cider(["zebra"], [["a cat"]]) == [0.0]


def test_same_digits_as_pycocoevalcap():
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gold = dict(enumerate(REFERENCES))
    said = {i: [text] for i, text in enumerate(SAID)}
    assert bleu(SAID, REFERENCES) == bleu_module.Bleu(4).compute_score(gold, said, verbose=0)[0]
    assert cider(SAID, REFERENCES) == list(Cider().compute_score(gold, said)[1])
    assert [rouge_l(s, r) for s, r in zip(SAID, REFERENCES, strict=True)] == list(
        Rouge().compute_score(gold, said)[1]
    )


def test_java_programs_agree(monkeypatch):
    if caption_java.missing():
        pytest.skip(caption_java.missing())
    texts = ["A man's T-shirt, isn't it?", "Plan B.", "The dogs' toys (two) cost $5.", ""]
    assert caption_java.tokenize(texts) == tokenize(texts)


def test_files_and_absent_meteor(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_java, "missing", lambda: "no Java here")
    gold = one(tmp_path / "g", dict(zip("123", REFERENCES, strict=True)))
    rows = [{"image_id": i, "caption": text} for i, text in enumerate(SAID, 1)]
    result = get_benchmark("captions").score(one(tmp_path / "p", rows), gold)
    assert result["METEOR_absent"] == "no Java here"
    assert "METEOR" not in result
    assert result["score"] == result["CIDEr"]
    assert "no Java" in result["tokenizer"]
    coco = {
        "annotations": [{"image_id": i, "caption": c} for i, refs in enumerate(REFERENCES, 1) for c in refs]
    }
    again = get_benchmark("refcoco+_caption").score(
        tmp_path / "p", one(tmp_path / "g", coco), tokenizer="none"
    )
    assert again["benchmark"] == "refcoco+_caption"
    assert again["CIDEr"] == result["CIDEr"]
    assert get_benchmark("captions").score(one(tmp_path / "p", rows[:2]), tmp_path / "g")["score"] is None
    with pytest.raises(ValueError, match="no tokenizer 'x'"):
        get_benchmark("captions").score(tmp_path / "p", tmp_path / "g", tokenizer="x")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(), min_size=1, max_size=3))
def test_fuzzed_captions(texts):
    said = tokenize(texts)
    assert all(not set(line.split(" ")) & PUNCTUATION for line in said)
    assert all(token == token.lower() or not token.isascii() for text in texts for token in tokens(text))
    references = [["a cat on a mat", "the cat"]] * len(said)
    assert all(0 <= b <= 1 + 1e-6 for b in bleu(said, references))
    assert all(0 <= rouge_l(s, r) <= 1 for s, r in zip(said, references, strict=True))
    assert all(0 <= c <= 10 for c in cider(said, references))
