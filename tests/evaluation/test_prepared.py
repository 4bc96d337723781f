"""Benchmarks prepared as tensorflow-datasets data give the same prompts, pictures, scores and uploads."""

import pytest
from test_published import answer, mmbench, mmmu, refcoco, submission, textvqa

from mllm_jax.data.reading import DataError
from mllm_jax.evaluation.benchmarks import BenchmarkError, read_benchmark
from mllm_jax.evaluation.prepared import instructions, prepare
from mllm_jax.evaluation.run import open_benchmark
from mllm_jax.evaluation.selection import select_benchmarks


@pytest.mark.parametrize(
    ("kind", "write", "options", "texts"),
    [
        ("mmbench", mmbench, {"rounds": "circular"}, ["B", "A", "A", "C", "B"]),
        ("textvqa", textvqa, {"ocr": "false"}, ["dakota", "red"]),
        ("refcoco_caption", refcoco, {}, ["left cup"]),
    ],
)
def test_prepared_is_the_same_benchmark(tmp_path, kind, write, options, texts, monkeypatch):
    monkeypatch.setattr("mllm_jax.evaluation.caption_java.missing", lambda: "slow")
    folder = tmp_path / "files" / kind
    folder.mkdir(parents=True)
    write(folder)
    raw = read_benchmark(kind, folder, **options)
    ours = prepare(kind, folder, tmp_path / "data", show_progress=False, **options)
    assert ours.fingerprint == raw.fingerprint  # stored answers go on where they were, whichever is read
    assert ours.values == raw.values
    for question in raw.questions:
        assert [ours.read_image(name) for name in question.images] == [
            raw.read_image(name) for name in question.images
        ]
    scores = answer(raw, tmp_path / "raw", texts)
    assert scores["n"]
    assert answer(ours, tmp_path / "ours", texts) == scores
    if kind == "mmbench":
        assert submission(ours, tmp_path / "ours").exists()
    directory = ours.source.directory
    again = read_benchmark(kind, directory)  # without the official files
    assert again.fingerprint == raw.fingerprint
    with pytest.raises(BenchmarkError, match="its options are chosen already"):
        read_benchmark(kind, directory, split="val")
    with pytest.raises(BenchmarkError, match=f"holds '{kind}', not 'pope'"):
        read_benchmark("pope", directory)
    assert (
        prepare(kind, folder, tmp_path / "data", show_progress=False, **options).source.directory == directory
    )


def test_how_answers_are_generated_needs_no_copy(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    mmmu(folder)
    made = [
        prepare("mmmu", folder, tmp_path / "data", show_progress=False, **options)
        for options in ({}, {"decoding": "sampled"}, {"decoding": "sampled", "seed": "7"})
    ]
    assert {benchmark.source.directory for benchmark in made} == {tmp_path / "data" / "mmmu" / "1.0.0"}
    assert [benchmark.sampling and benchmark.sampling.seed for benchmark in made] == [None, 42, 7]
    directory = made[0].source.directory
    assert "decoding" not in made[0].source.metadata["options"]
    assert read_benchmark("mmmu", directory).sampling is None
    assert read_benchmark("mmmu", directory, decoding="sampled").sampling.seed == 42
    with pytest.raises(BenchmarkError, match="add decoding=sampled"):
        read_benchmark("mmmu", directory, seed="7")


def test_a_changed_file_is_prepared_again(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    textvqa(folder)
    first = prepare("textvqa", folder, tmp_path / "data", show_progress=False)
    (folder / "train_images" / "ab12.jpg").write_bytes(first.read_image("ab12.jpg") + b"\0")
    second = prepare("textvqa", folder, tmp_path / "data", show_progress=False)
    assert (first.source.directory.name, second.source.directory.name) == ("1.0.0", "2.0.0")
    (folder / "train_images" / "ab12.jpg").unlink()
    with pytest.raises((OSError, DataError)):
        prepare("textvqa", folder, tmp_path / "data", show_progress=False)


def test_instructions_name_every_file_and_its_source(tmp_path):
    textvqa(tmp_path)
    text = instructions(read_benchmark("textvqa", tmp_path))
    assert (
        "TextVQA_0.5.1_val.json: from https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
        in text
    )
    assert "train_images: from https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip" in text


def test_the_command_line_prepares_and_reads(tmp_path):
    folder = tmp_path / "files" / "textvqa"
    folder.mkdir(parents=True)
    textvqa(folder)
    chosen = select_benchmarks(["textvqa:ocr=false"], tmp_path / "files", tmp_path / "data")
    benchmark = open_benchmark(chosen["textvqa-ocr=false"])
    assert benchmark.source.directory == tmp_path / "data" / "textvqa" / "1.0.0"
    plain = open_benchmark(select_benchmarks(["textvqa:ocr=false"], tmp_path / "files")["textvqa-ocr=false"])
    assert plain.source is None
    assert plain.fingerprint == benchmark.fingerprint
