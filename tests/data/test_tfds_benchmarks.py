import hashlib
import json

import pytest
import tensorflow_datasets as tfds
import tiny

from mllm_jax.data.images import ImageError
from mllm_jax.data.reading import DataError
from mllm_jax.data.tfds_benchmarks import BenchmarkSource, ImageSet, is_prepared, prepare_benchmark

PICTURES = {name: tiny.png(seed) for seed, name in enumerate("abc")}
SETS = [
    ImageSet(
        ("a",),
        ({"prompt": "What?", "row": {"question_id": 1}}, {"prompt": "Wo? ü", "row": {"question_id": 2}}),
    ),
    ImageSet(("b", "c"), ({"prompt": "Which?", "row": {"question_id": 3}},)),
    ImageSet((), ({"prompt": "No picture", "row": {"question_id": 4}},)),
]


@pytest.fixture
def manual(tmp_path):
    """A folder with a downloaded question file."""
    folder = tmp_path / "manual"
    folder.mkdir()
    (folder / "questions.json").write_text("[]")
    return folder


def prepare(manual, data_dir, **changes):
    values = {
        "kind": "toy",
        "sets": SETS,
        "read_image": PICTURES.__getitem__,
        "stamp": "1",
        "content": lambda: "one",
    }
    values |= changes
    files = [manual / "questions.json"]
    return prepare_benchmark(
        data_dir=data_dir,
        files=files,
        manual_dir=manual,
        options={"ocr": True},
        show_progress=False,
        **values,
    )


def test_pictures_and_questions_are_kept(manual, tmp_path):
    source = prepare(manual, tmp_path / "data", shard_bytes=1)
    assert source.directory == tmp_path / "data" / "toy" / "1.0.0"
    assert source.sets == SETS
    assert {name: source.image(name) for name in PICTURES} == PICTURES
    assert "a" in source
    assert "d" not in source
    assert len(list(source.directory.glob("*.array_record*"))) == 3
    assert source.metadata["options"] == {"ocr": True}
    assert source.metadata["files"] == {"questions.json": hashlib.sha256(b"[]").hexdigest()}
    again = BenchmarkSource(source.directory)
    assert again.sets == SETS


def test_it_is_an_ordinary_data_set(manual, tmp_path):
    """Readable without this package's classes, picture by picture."""
    directory = prepare(manual, tmp_path / "data").directory
    records = tfds.builder_from_directory(directory).as_data_source("test")
    assert len(records) == 3
    assert records[1]["images"][0].shape == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)
    assert [name.decode() for name in records[1]["image_names"]] == ["b", "c"]
    assert json.loads(records[0]["prompts"]) == list(SETS[0].prompts)


def test_the_same_files_are_prepared_once(manual, tmp_path):
    first = prepare(manual, tmp_path / "data")
    shard = next(first.directory.glob("*.array_record*"))
    before = shard.stat().st_mtime_ns
    assert prepare(manual, tmp_path / "data").directory == first.directory
    assert shard.stat().st_mtime_ns == before
    assert prepare(manual, tmp_path / "data", stamp="2").directory == first.directory  # copied again
    changed = prepare(manual, tmp_path / "data", stamp="2", content=lambda: "two")
    assert changed.directory.name == "2.0.0"
    plus = prepare(manual, tmp_path / "data", kind="toy+")
    assert plus.directory.parent.name == "toy_plus"


def test_checksums_of_the_manual_folder(manual, tmp_path):
    sums = manual / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(b'[]').hexdigest()}  questions.json\n")
    prepare(manual, tmp_path / "good")
    sums.write_text(f"{'0' * 64}  questions.json\n")
    with pytest.raises(
        DataError, match=r"questions.json has the SHA-256 digest .*, not 0000.*download it again"
    ):
        prepare(manual, tmp_path / "bad")
    sums.write_text(f"{'0' * 64} *gone.zip\n")
    with pytest.raises(DataError, match=r"gone.zip is missing, but .*SHA256SUMS lists it"):
        prepare(manual, tmp_path / "bad")
    sums.write_text("nonsense\n")
    with pytest.raises(DataError, match="SHA256SUMS line 1: expected a SHA-256 digest"):
        prepare(manual, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_what_is_no_preparation(manual, tmp_path):
    with pytest.raises(DataError, match="no prepared benchmark here"):
        BenchmarkSource(tmp_path)
    source = prepare(manual, tmp_path / "data")
    assert is_prepared(source.directory)
    prompts = source.directory / "prompts.json"
    prompts.write_text(json.dumps(json.loads(prompts.read_text())[:2]))
    with pytest.raises(DataError, match="3 records with images, 2 with questions, 3 were written"):
        BenchmarkSource(source.directory)
    prompts.unlink()
    assert not is_prepared(source.directory)


def test_an_unreadable_picture_leaves_nothing_behind(manual, tmp_path):
    def broken(name):
        raise DataError(f"picture {name} cannot be read")

    with pytest.raises(DataError, match="picture a cannot be read"):
        prepare(manual, tmp_path / "data", read_image=broken)
    assert not list((tmp_path / "data").glob("toy/1.0.0"))


def test_only_images_are_handed_on(manual, tmp_path):
    files = PICTURES | {"b": b"root:x:0:0:"}
    with pytest.raises(ImageError, match="toy: b: not an image"):
        prepare(manual, tmp_path / "data", read_image=files.__getitem__)
    assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_older_preparations_are_found_by_the_times_of_their_files(manual, tmp_path):
    first = prepare(manual, tmp_path / "data")
    path = first.directory / "metadata.json"
    noted = json.loads(path.read_text())
    path.write_text(json.dumps(noted | {"fingerprint": noted.pop("stamp")}))
    assert prepare(manual, tmp_path / "data", content=lambda: "three").directory == first.directory


def test_prepared_benchmarks_cannot_name_code_to_run(manual, tmp_path, monkeypatch):
    source = prepare(manual, tmp_path / "data")
    (tmp_path / "planted_benchmark.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Image: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    planted = {"pythonClassName": "planted_benchmark.Image", "featuresDict": {"features": {}}}
    (source.directory / "features.json").write_text(json.dumps(planted))
    assert BenchmarkSource(source.directory).image("a") == PICTURES["a"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["{}", "[[1, 2]]", '[[["a"], [3]]]', "[" * 100_000, "["])
def test_damaged_questions_are_named(text, manual, tmp_path):
    source = prepare(manual, tmp_path / "data")
    (source.directory / "prompts.json").write_text(text)
    with pytest.raises(DataError, match=r"prompts\.json"):
        BenchmarkSource(source.directory)
