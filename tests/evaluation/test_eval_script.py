"""eval.py on published benchmarks: a trained run and an imported model, resumed, with uploads and mistakes named."""

import dataclasses
import json
import pathlib

import pytest
import tiny
from absl.testing import flagsaver

from mllm_jax.config import ConfigError
from mllm_jax.evaluation import answer as answer_module
from mllm_jax.evaluation.benchmarks import BenchmarkError, get_benchmark
from mllm_jax.interop import checkpoints, native, saved_params
from mllm_jax.models import mllm


@pytest.fixture(scope="module")
def evaluate(eval_script):
    """Runs eval.py's `main` with flags given as keywords."""

    def run(**values):
        with flagsaver.flagsaver(
            **{name: str(v) if isinstance(v, pathlib.Path) else v for name, v in values.items()}
        ):
            eval_script.main([])

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MMBench with three rotations of one question and a second question, and POPE with one question a split."""
    return tiny.write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny_checkpoints, tiny_params):
    """What train.py leaves of a run, as far as eval.py reads it."""
    root = tmp_path_factory.mktemp("run")
    config = tiny.recipe(
        tiny_checkpoints, dict.fromkeys(("captions", "instructions"), ("data.json", "images"))
    )
    (root / "config.json").write_text(json.dumps(config.to_dict()))
    saved_params.save_params(root / "params" / "finetune", tiny_params)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """The same model as `mllm-jax import` writes one."""
    root = tmp_path_factory.mktemp("imported") / "model"
    native.save_native(root, tiny_model, tiny_params)
    tiny_tokenizer.save_pretrained(root)
    return root


SMALL = {"max_new_tokens": 4, "batch_size": 8}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_trained_run_answers_published_benchmarks(evaluate, workdir, data, monkeypatch, capsys):
    names = {"workdir": workdir, "benchmarks": ["mmbench", "pope"], "data_dir": data, "likelihood": True}
    evaluate(**names, **SMALL)
    out = workdir / "eval"
    summary = json.loads((out / "summary.json").read_text())["benchmarks"]
    assert {name: (found["kind"], found["scores"]["n"]) for name, found in summary.items()} == {
        "mmbench": ("mmbench", 2),
        "pope": ("pope", 3),
    }
    scores = summary["mmbench"]["scores"]
    assert scores["complete"]
    assert {"blind", "majority", "likelihood"} <= set(scores)
    assert scores["likelihood"]["n"] == 2
    assert set(scores["subtasks"]) == {"image_style", "ocr"}
    answers = rows(out / "mmbench" / "predictions.jsonl")
    assert [row["question_id"] for row in answers] == [3, 1000003, 2000003, 5, 1000005]
    assert answers[0]["prompt"].startswith(
        "What?\nA. red\nB. blue\nC. green\nAnswer with the option's letter"
    )
    again = get_benchmark("mmbench").score(
        out / "mmbench" / "predictions.jsonl", out / "mmbench" / "annotations.json"
    )
    assert {**scores, **again} == scores  # `mllm-jax score` on what is kept
    assert (out / "mmbench" / "submission" / "mmbench.xlsx").exists()
    assert "mmbench: submission for" in capsys.readouterr().out
    assert (out / "report.html").exists()

    path = out / "mmbench" / "predictions.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"".join(before.splitlines(keepends=True)[:3]))  # stopped in the middle
    asked = []
    original = answer_module.generate

    def counting(config, params, requests, *args, **settings):
        def tap():
            for request in requests:
                asked.append(request.id)
                yield request

        return original(config, params, tap(), *args, **settings)

    monkeypatch.setattr(answer_module, "generate", counting)
    evaluate(**names, **SMALL)
    assert asked == ["5", "1000005"]
    assert path.read_bytes() == before


def test_an_imported_model_answers_like_the_run_it_came_from(evaluate, workdir, model, data, tmp_path):
    names = {"benchmarks": ["mmbench:rounds=vanilla"], "data_dir": data, "blind": False}
    evaluate(workdir=workdir, out=tmp_path / "run", **names, **SMALL)
    where = {"out": tmp_path / "imported", "prepared": tmp_path / "prepared"}  # and read from prepared data
    evaluate(model=model, template="mistral_instruct", **where, **names, **SMALL)  # in its own dtype
    assert (tmp_path / "prepared" / "mmbench" / "1.0.0" / "prompts.json").is_file()
    texts = [
        [row["text"] for row in rows(tmp_path / where / "eval" / "mmbench-vanilla" / "predictions.jsonl")]
        for where in ("run", "imported")
    ]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_a_llava_hf_checkpoint_is_asked_as_it_is(evaluate, tiny_model, tiny_tokenizer, data, tmp_path):
    config = dataclasses.replace(tiny_model, connector="mlp2x_gelu", connector_options=())
    params = tiny.random_params(mllm.abstract_params(config))
    native.save_native(tmp_path / "native", config, params, "safetensors")
    tiny_tokenizer.save_pretrained(tmp_path / "native")
    checkpoints.save_llava_hf(tmp_path / "hf", config, params, tiny_tokenizer)  # adds an <image> token
    texts = []
    for name in ("native", "hf"):
        out = tmp_path / f"answers_{name}"
        values = {
            "template": "mistral_instruct",
            "dtype": "float32",
            "benchmarks": ["pope"],
            "data_dir": data,
        }
        evaluate(model=tmp_path / name, out=out, blind=False, **values, **SMALL)
        texts.append([row["text"] for row in rows(out / "eval" / "pope" / "predictions.jsonl")])
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]


def test_prompts_beyond_the_context(evaluate, workdir, data, tmp_path):
    names = {"workdir": workdir, "benchmarks": ["pope"], "data_dir": data, "blind": False, "batch_size": 8}
    with pytest.raises(
        BenchmarkError, match="answers of up to 510 tokens do not fit the model's context of 512"
    ):
        evaluate(**names, max_new_tokens=510, out=tmp_path / "a")
    evaluate(**names, max_new_tokens=450, overlong="empty", out=tmp_path / "b")
    answers = rows(tmp_path / "b" / "eval" / "pope" / "predictions.jsonl")
    assert [(row["text"], row["how"]) for row in answers] == [("", "too_long")] * 3
    scores = json.loads((tmp_path / "b" / "eval" / "pope" / "scores.json").read_text())
    assert scores["problems"]["empty_answer"]["count"] == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either --workdir"),
        ({"workdir": "x", "model": "y"}, "give either --workdir"),
        ({"model": "y", "template": "plain"}, "--model needs --out"),
        ({"model": "y", "template": "plain", "out": "o"}, "give --benchmarks or --benchmark"),
        ({"workdir": "x", "benchmarks": ["mme"]}, "--benchmarks needs --data_dir"),
        (
            {"workdir": "x", "benchmarks": ["mme"], "benchmark": "vqa", "data_dir": "d"},
            "give either --benchmarks",
        ),
        ({"workdir": "x"}, "holds no run: config.json is missing"),
        (
            {"model": "y", "template": "vicuna", "out": "o"},
            "--template: unknown template 'vicuna'; did you mean",
        ),
        ({"model": "y", "template": "chat@soon", "out": "o"}, "--template: .*'soon' is not a day"),
        (
            {"model": "y", "template": "chat@2025-01-31", "out": "o"},
            "give --benchmarks or --benchmark",  # the template is accepted
        ),
    ],
)
def test_mistakes_in_flags(evaluate, values, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(**values)


def test_what_a_run_records_is_not_set_otherwise(evaluate, workdir, data, tmp_path):
    names = {"workdir": workdir, "benchmarks": ["pope"], "data_dir": data, "out": tmp_path}
    for flag, value in (("aspect", "square"), ("dtype", "bfloat16"), ("tower", "x"), ("tokenizer", "x")):
        with pytest.raises(ConfigError, match=f"records its {flag}; leave {flag} out"):
            evaluate(**names, **{flag: value})


def test_a_missing_benchmark_is_one_message(evaluate, workdir, data):
    with pytest.raises(BenchmarkError, match=r"mme: .*mme/MME_Benchmark_release_version is missing"):
        evaluate(workdir=workdir, benchmarks=["pope", "mme"], data_dir=data, out=workdir / "elsewhere")
    assert not (workdir / "elsewhere" / "eval" / "pope").exists()  # read before anything is answered
