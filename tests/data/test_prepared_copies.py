"""Prepared data: the same data wherever it lies, broken samples left out if asked, and nothing executed."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data import source_digest, tfds_llava
from mllm_jax.data.images import ImageError
from mllm_jax.data.reading import DataError
from mllm_jax.data.tfds_llava import LlavaSource, prepare, prepared


def turns(question, answer="A shape."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path):
    """A data set in a folder of its own."""
    images = tmp_path / "source" / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).save(images / name)
    entries = [
        {"id": "one", "image": "a.png", "conversations": turns("<image>\nWhat?")},
        {"id": "two", "image": ["b.png", "c.png"], "conversations": turns("<image><image>\nWhat?")},
        {"id": "text", "conversations": turns("What?", "Ünï 🙂")},
    ]
    (tmp_path / "source" / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path / "source"


def make(folder, out, **options):
    return prepare(folder / "data.json", folder / "images", out, show_progress=False, **options)


def same(one, other):
    return (one.directory, one.fingerprint) == (other.directory, other.fingerprint)


def test_copies_are_the_same_data(folder, tmp_path, monkeypatch):
    first = make(folder, tmp_path / "out")
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert same(make(folder, tmp_path / "out"), first)
    copied = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copied, copy_function=shutil.copy)  # other times, another path
    assert same(make(copied, tmp_path / "out"), first)

    # a copy that was recognised is not read again
    monkeypatch.setattr(source_digest, "image_digests", None)
    assert same(make(copied, tmp_path / "out"), first)
    assert same(make(folder, tmp_path / "out"), first)


def test_the_layout_of_the_json_is_no_other_data(folder, tmp_path):
    first = make(folder, tmp_path / "out")
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    (folder / "data.json").write_bytes(json.dumps(entries, indent=4, ensure_ascii=False).encode("utf-8-sig"))
    assert same(make(folder, tmp_path / "out"), first)


@pytest.mark.parametrize("what", ["image", "answer", "order", "name"])
def test_other_bytes_are_other_data_whatever_their_times_say(what, folder, tmp_path):
    first = make(folder, tmp_path / "out")
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    if what == "image":
        status = (folder / "images" / "c.png").stat()
        shutil.copyfile(folder / "images" / "b.png", folder / "images" / "c.png")
        os.utime(folder / "images" / "c.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif what == "answer":
        entries[0]["conversations"][1]["value"] = "A shapes."
    elif what == "order":
        entries.reverse()
    else:
        (folder / "images" / "a.png").rename(folder / "images" / "d.png")
        entries[0]["image"] = "d.png"
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    other = make(folder, tmp_path / "out")
    assert other.directory.name == "2.0.0"
    assert other.fingerprint != first.fingerprint


def test_data_prepared_by_older_versions_is_still_used(folder, tmp_path):
    """Their fingerprint was of names, sizes and times; a run that began with one goes on with it."""
    first = make(folder, tmp_path / "out")
    path = first.directory / "metadata.json"
    noted = json.loads(path.read_text())
    old = {"fingerprint": noted["stamp"], "samples": noted["samples"], "json": "data.json"}
    path.write_text(json.dumps(old))
    assert make(folder, tmp_path / "out").fingerprint == noted["stamp"]
    for file in folder.rglob("*"):
        os.utime(file, (1, 1))
    again = make(folder, tmp_path / "out")
    assert (again.directory.name, again.fingerprint) == ("1.0.0", noted["stamp"])
    Image.new("RGB", (2, 2)).save(folder / "images" / "c.png")
    assert make(folder, tmp_path / "out").directory.name == "2.0.0"


def test_a_prepared_copy_is_enough(folder, tmp_path):
    first = make(folder, tmp_path / "out")
    shutil.rmtree(folder)
    assert same(prepared(tmp_path / "out", "llava", first.fingerprint), first)
    assert prepared(tmp_path / "out", "llava", "0" * 64) is None
    assert prepared(tmp_path / "nowhere", "llava", first.fingerprint) is None


def break_some(folder):
    """Six broken samples between the sound ones; returns the sound ids."""
    images = folder / "images"
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    whole = (images / "a.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").touch()
    Image.new("RGB", (50, 50)).save(images / "large.png")
    broken = [
        {"id": name, "image": f"{name}.png", "conversations": turns("<image>\nWhat?")}
        for name in ("missing", "cut", "empty", "large")
    ]
    broken.append({"id": "half", "conversations": turns("What?", "\ud83d")})
    broken.append({"id": "silent", "conversations": turns("What?", "")})
    mixed = [one for pair in zip(broken[:3], entries, strict=True) for one in pair] + broken[3:]
    (folder / "data.json").write_text(json.dumps(mixed), encoding="utf-8")
    return [entry["id"] for entry in entries]


def test_broken_samples_are_left_out_and_listed_if_asked(folder, tmp_path):
    clean = make(folder, tmp_path / "out", max_image_pixels=1000)
    sound = break_some(folder)
    with pytest.raises(DataError, match="sample 'missing'"):
        make(folder, tmp_path / "out", max_image_pixels=1000)
    source = make(folder, tmp_path / "out", max_image_pixels=1000, broken="skip")
    assert [source[i].id for i in range(len(source))] == sound
    problems = {one["sample"]: one["problem"] for one in source.skipped}
    assert list(problems) == ["missing", "cut", "empty", "large", "half", "silent"]
    for sample, said in {
        "missing": "missing.png",
        "cut": "truncated",
        "empty": "empty",
        "large": "2500 pixels",
        "half": "surrogate",
        "silent": "answer is empty",
    }.items():
        assert said in problems[sample]
    listed = (source.directory / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in listed] == source.skipped == LlavaSource(source.directory).skipped

    assert source.fingerprint != clean.fingerprint
    assert same(make(folder, tmp_path / "out", max_image_pixels=1000, broken="skip"), source)
    with pytest.raises(DataError, match="sample 'missing'"):  # what was left out is not forgotten
        make(folder, tmp_path / "out", max_image_pixels=1000)
    more = make(folder, tmp_path / "out", max_image_pixels=2500, broken="skip")
    assert len(more) == len(source) + 1
    assert more.fingerprint != source.fingerprint
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert same(make(folder, tmp_path / "out", max_image_pixels=1000, broken="skip"), source)


def test_skipping_changes_nothing_of_sound_data(folder, tmp_path):
    first = make(folder, tmp_path / "out", max_image_pixels=1000)
    assert same(make(folder, tmp_path / "out", max_image_pixels=1000, broken="skip"), first)
    assert first.skipped == []
    with pytest.raises(ImageError, match="exceed the limit of 34"):  # looked at again under a lower limit
        make(folder, tmp_path / "out", max_image_pixels=34)
    only = [{"id": "x", "image": "no.png", "conversations": turns("<image>\nWhat?")}]
    (folder / "data.json").write_text(json.dumps(only))
    with pytest.raises(DataError, match="every sample is broken"):
        make(folder, tmp_path / "out", broken="skip")


def test_what_is_not_one_samples_fault_is_never_skipped(folder, tmp_path):
    entries = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    (folder / "data.json").write_text(json.dumps([*entries, entries[0]]))
    with pytest.raises(DataError, match="more than once"):
        make(folder, tmp_path / "out", broken="skip")
    (folder / "data.json").write_text("[")
    with pytest.raises(DataError, match="not valid JSON"):
        make(folder, tmp_path / "out", broken="skip")


def test_prepared_data_cannot_name_code_to_run(folder, tmp_path, monkeypatch):
    """`tfds.builder_from_directory` imports the classes that features.json names."""
    source = make(folder, tmp_path / "out")
    (tmp_path / "planted_features.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Image: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    planted = {"pythonClassName": "planted_features.Image", "featuresDict": {"features": {}}}
    (source.directory / "features.json").write_text(json.dumps(planted))
    again = LlavaSource(source.directory)
    assert again[1].images == source[1].images
    assert not (tmp_path / "ran").exists()
    assert "planted_features" not in sys.modules


@pytest.mark.parametrize("damage", ["shard", "gone", "deep", "list"])
def test_damaged_prepared_data_is_named(damage, folder, tmp_path):
    source = make(folder, tmp_path / "out")
    (shard,) = source.directory.glob("*.array_record-*")
    if damage == "shard":
        shard.write_bytes(b"no records" * 9)
    elif damage == "gone":
        shard.unlink()
    else:
        text = "[" * 100_000 if damage == "deep" else "[1, 2]"
        (source.directory / "metadata.json").write_text(text)
    with pytest.raises(DataError, match=r"1\.0\.0"):
        LlavaSource(source.directory)


def test_nothing_is_left_in_the_systems_temporary_folder(folder, tmp_path):
    (tmp_path / "tmp").mkdir()
    code = (
        "import sys; from mllm_jax.data.tfds_llava import prepare\n"
        "prepare(*sys.argv[1:], show_progress=False)\n"
    )
    arguments = [str(folder / "data.json"), str(folder / "images"), str(tmp_path / "out")]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    subprocess.run([sys.executable, "-c", code, *arguments], env=environment, check=True)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert tfds_llava.SPLIT in {
        path.name.split("-")[1].split(".")[0] for path in (tmp_path / "out").rglob("*array_record*")
    }
