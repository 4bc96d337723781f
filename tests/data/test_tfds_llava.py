"""LLaVA JSON and images become ArrayRecord: complete, reused, never half-written, without TensorFlow."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data import tfds_llava
from mllm_jax.data.images import ImageError
from mllm_jax.data.reading import DataError
from mllm_jax.data.tfds_llava import LlavaSource, prepare


def entry(sample_id, images, text="What is this?", answer="A shape."):
    question = "<image>\n" * len(images) + text
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "conversations": turns} | ({"image": images} if images else {})


@pytest.fixture
def data(tmp_path):
    """A JSON with one, two and no images per sample, and the folder of images in several formats."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "sub/b.jpg", "c.bmp", "d.tiff"):
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).save(images / name)
    Image.new("L", (4, 4), 0).save(images / "zeros.bmp")  # its bytes end with zeros
    entries = [
        entry("one", ["a.png"]),
        entry("ünï", ["sub/b.jpg", "c.bmp"], answer="Zwei Bilder – “quoted”."),
        entry("text", []),
        entry("again", ["a.png"]),
        entry("tiff", ["d.tiff", "zeros.bmp"]),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path, images, entries


def test_round_trip_keeps_order_bytes_and_conversations(data, tmp_path):
    path, images, entries = data
    source = prepare(path, images, tmp_path / "out", name="tiny", show_progress=False)
    assert len(source) == len(entries)
    for sample, expected in zip([source[i] for i in range(len(source))], entries, strict=True):
        assert sample.id == expected["id"]
        assert list(sample.conversations) == expected["conversations"]
        assert list(sample.image_paths) == expected.get("image", [])
        assert [bytes(image) for image in sample.images] == [
            (images / name).read_bytes() for name in expected.get("image", [])
        ]
    Image.open(io.BytesIO(source[1].images[0])).verify()
    assert pickle.loads(pickle.dumps(source))[4] == source[4]  # as worker processes receive it
    assert source.directory == tmp_path / "out" / "tiny" / "1.0.0"
    assert LlavaSource(source.directory)[2] == source[2]


def test_several_shards_keep_the_order(data, tmp_path):
    path, images, entries = data
    source = prepare(path, images, tmp_path / "out", shard_bytes=200, show_progress=False)
    assert len(list(source.directory.glob("*.array_record-*"))) >= 3
    assert [source[i].id for i in range(len(source))] == [item["id"] for item in entries]


def test_tensorflow_is_not_needed(data, tmp_path):
    path, images, _ = data
    code = (
        "import sys\n"
        "class Hide:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "    def find_spec(self, name, *args):\n"
        "        return None if name.split('.')[0] == 'tensorflow' else self.finder.find_spec(name, *args)\n"
        "sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]\n"
        "from mllm_jax.data.tfds_llava import prepare\n"
        f"source = prepare({str(path)!r}, {str(images)!r}, {str(tmp_path / 'out')!r}, show_progress=False)\n"
        "print(len(source), source[0].id)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "5 one\n", result.stderr


def test_unchanged_sources_are_reused_and_changed_ones_rebuilt(data, tmp_path):
    path, images, entries = data
    out = tmp_path / "out"
    first = prepare(path, images, out, show_progress=False)
    stamp = (first.directory / "dataset_info.json").stat().st_mtime_ns
    again = prepare(path, images, out, show_progress=False)
    assert again.directory == first.directory
    assert (again.directory / "dataset_info.json").stat().st_mtime_ns == stamp

    entries[0]["conversations"][1]["value"] = "Changed."
    original = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(entries), encoding="utf-8")
    changed = prepare(path, images, out, show_progress=False)
    assert changed.directory.name == "2.0.0"
    assert changed[0].conversations[1]["value"] == "Changed."
    assert first[0].conversations[1]["value"] == "A shape."  # the old version is still there

    Image.new("RGB", (9, 9)).save(images / "c.bmp")  # same paths, another picture
    assert prepare(path, images, out, show_progress=False).directory.name == "3.0.0"

    path.write_text(original, encoding="utf-8")  # JSON as at first, but the picture has changed
    assert prepare(path, images, out, show_progress=False).directory.name == "4.0.0"


def test_numbering_ids_that_do_not_repeat_is_no_other_data(data, tmp_path):
    path, images, _ = data
    first = prepare(path, images, tmp_path / "out", show_progress=False)
    again = prepare(path, images, tmp_path / "out", duplicate_ids="number", show_progress=False)
    assert (again.directory, again.fingerprint) == (first.directory, first.fingerprint)


def test_a_missing_or_empty_image_is_named_and_nothing_is_left(data, tmp_path):
    path, images, _ = data
    (images / "sub" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"sample 'ünï'.*sub/b\.jpg does not exist"):
        prepare(path, images, tmp_path / "out", show_progress=False)
    (images / "sub" / "b.jpg").touch()
    with pytest.raises(DataError, match=r"sample 'ünï': image file .*b\.jpg is empty"):
        prepare(path, images, tmp_path / "out", show_progress=False)
    assert [path.name for path in (tmp_path / "out" / "llava").iterdir()] == [
        ".unfinished"
    ]  # which are sound


def test_broken_and_huge_images_are_named_before_anything_is_written(data, tmp_path):
    path, images, _ = data
    out = tmp_path / "out"
    with pytest.raises(ImageError, match=r"sample 'one', .*a\.png: 7 x 5 = 35 pixels exceed the limit of 34"):
        prepare(path, images, out, max_image_pixels=34, show_progress=False)
    whole = (images / "sub" / "b.jpg").read_bytes()
    (images / "sub" / "b.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"sample 'ünï', .*b\.jpg: damaged or truncated JPEG"):
        prepare(path, images, out, max_image_pixels=35, show_progress=False)
    assert [path.name for path in (out / "llava").iterdir()] == [".unfinished"]  # which images are sound
    (images / "sub" / "b.jpg").write_bytes(whole)
    assert len(prepare(path, images, out, max_image_pixels=35, show_progress=False)) == 5


def test_a_full_disk_is_an_os_error_and_nothing_is_left(data, tmp_path):
    path, images, _ = data
    out = tmp_path / "out"
    code = (
        "import resource\n"
        "from mllm_jax.data.tfds_llava import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"  # a file that grows larger fails, as on a full disk
        "try:\n"
        f"    prepare({str(path)!r}, {str(images)!r}, {str(out)!r}, show_progress=False)\n"
        "except OSError as error:\n"
        "    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("prepared data could not be written ("), result.stderr
    assert not any("1.0.0" in path.name or path.name.endswith(".part") for path in out.rglob("*"))


def test_text_only_data_needs_no_folder_and_others_do(data, tmp_path):
    path, _, _ = data
    with pytest.raises(DataError, match="sample 'one' has an image but no image folder"):
        prepare(path, None, tmp_path / "out", show_progress=False)
    path.write_text(json.dumps([entry("text", [])]))
    assert prepare(path, None, tmp_path / "out", show_progress=False)[0].images == ()
    with pytest.raises(ValueError, match="lower-case letters"):
        prepare(path, None, tmp_path / "out", name="Not OK", show_progress=False)


def test_a_preparation_killed_half_way_does_not_look_complete(data, tmp_path):
    path, images, _ = data
    out = tmp_path / "out"
    code = (
        "import sys, time\n"
        "from mllm_jax.data import tfds_llava\n"
        "read = tfds_llava.read_image_file\n"
        "seen = []\n"
        "def slow(root, name, sample):\n"
        "    seen.append(name)\n"
        "    if name == 'd.tiff':\n"  # it has been looked at by other code, and is written now
        "        print('half way', flush=True); time.sleep(60)\n"
        "    return read(root, name, sample)\n"
        "tfds_llava.read_image_file = slow\n"
        f"args = ({str(path)!r}, {str(images)!r}, {str(out)!r})\n"
        "tfds_llava.prepare(*args, show_progress=False, shard_bytes=200)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half way\n"
        os.kill(process.pid, signal.SIGKILL)
    assert any((out / "llava" / ".unfinished").rglob("00000-*"))  # files were being written
    assert not (out / "llava" / "1.0.0").exists()
    source = prepare(path, images, out, show_progress=False)
    assert source.directory.name == "1.0.0"
    assert source[4].id == "tiff"


def test_damaged_or_foreign_directories_are_refused(data, tmp_path):
    path, images, _ = data
    with pytest.raises(DataError, match="no prepared data set here"):
        LlavaSource(tmp_path)
    source = prepare(path, images, tmp_path / "out", show_progress=False)
    metadata = source.directory / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"samples": 9}))
    with pytest.raises(DataError, match="holds 5 samples instead of 9"):
        LlavaSource(source.directory)
    metadata.unlink()  # no longer recognised: the next preparation goes beside it, not over it
    assert prepare(path, images, tmp_path / "out", show_progress=False).directory.name == "2.0.0"


def test_a_second_process_that_finishes_first_is_accepted(data, tmp_path, monkeypatch):
    path, images, _ = data
    out = tmp_path / "out"
    read = tfds_llava.read_image_file
    raced = []

    def overtaken(root, name, sample):
        if not raced:
            raced.append(time.time())
            prepare(path, images, out, show_progress=False)
        return read(root, name, sample)

    monkeypatch.setattr(tfds_llava, "read_image_file", overtaken)
    source = prepare(path, images, out, show_progress=False)
    assert source.directory.name == "1.0.0"
    assert [p.name for p in (out / "llava").iterdir()] == ["1.0.0"]
