"""One table of benchmarks: every name is known wherever benchmarks are named."""

import json

import pytest

from mllm_jax.cli.main import main
from mllm_jax.evaluation.benchmarks import (
    BENCHMARKS,
    JUDGE_TASKS,
    PUBLISHED,
    Benchmark,
    BenchmarkError,
    get_asked,
    get_benchmark,
    read_benchmark,
)
from mllm_jax.evaluation.prepared import prepare
from mllm_jax.evaluation.selection import select_benchmarks


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_name_is_known_to_every_verb(name, tmp_path, capsys):
    benchmark = get_benchmark(name)
    assert benchmark.name == name
    # scoring
    assert main(["score", name, "--predictions", str(tmp_path / "absent")]) == 2
    message = capsys.readouterr().err
    assert "no benchmark" not in message
    assert (benchmark.not_scored or "absent") in message or "--annotations is needed" in message
    # answering, from the files or prepared, and their names on the command line
    if benchmark.not_asked:
        for verb in (
            get_asked,
            lambda n: read_benchmark(n, tmp_path),
            lambda n: prepare(n, tmp_path, tmp_path),
        ):
            with pytest.raises(BenchmarkError, match=f"{name!r} cannot be asked: ".replace("+", "[+]")):
                verb(name)
        return
    assert get_asked(name) is benchmark
    if name in PUBLISHED:
        assert list(select_benchmarks([name], tmp_path)) == [name]
        with pytest.raises(BenchmarkError, match="is missing"):
            prepare(name, tmp_path / "files", tmp_path / "data")
    else:
        with pytest.raises(BenchmarkError, match="nothing to prepare"):
            prepare(name, tmp_path, tmp_path)
        with pytest.raises(BenchmarkError, match="--path"):
            select_benchmarks([name], tmp_path)


def test_every_class_with_a_name_is_in_the_table():
    def below(benchmark):
        return {benchmark}.union(*map(below, benchmark.__subclasses__()))

    named = {benchmark for benchmark in below(Benchmark) if "name" in vars(benchmark)}
    assert named == set(BENCHMARKS.values())


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not BENCHMARKS[name].not_scored])
def test_what_is_scored_says_how(name):
    benchmark = BENCHMARKS[name]
    assert benchmark.rule
    assert benchmark.answers_format
    assert benchmark.unit in ("fraction", "percent", "points")
    if name in PUBLISHED and PUBLISHED[name].judged:
        assert name in JUDGE_TASKS


def test_files_of_mmmu_pro_vision_are_scored_by_name(tmp_path, capsys):
    row = {
        "id": "test_Art_1",
        "subject": "Art",
        "options": ["x", "y"],
        "answer": "B",
        "response": "Answer: B",
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["score", "mmmu_pro_vision", "--predictions", str(tmp_path / "p.jsonl")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["benchmark"], result["score"]) == ("mmmu_pro_vision", 100.0)


def test_a_mistyped_name_has_a_hint():
    with pytest.raises(BenchmarkError, match="no benchmark 'pop'; did you mean 'pope'"):
        get_benchmark("pop")
