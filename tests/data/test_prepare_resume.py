"""Preparing data in processes, stopped and continued: the same files in the end, and no work done twice."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from mllm_jax.data import image_checks, measure, tfds_llava, tfds_versions
from mllm_jax.data.images import ImageError
from mllm_jax.data.reading import DataError
from mllm_jax.data.rows import RowEncoder
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.worker_processes import worker_processes


def files_of(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def data(tmp_path):
    """A JSON of 40 samples, every fourth without an image, and its images."""
    images, rng = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    entries = []
    for number in range(40):
        picture = {"image": f"{number}.png"} if number % 4 else {}
        if picture:
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(images / picture["image"])
        turns = [
            {"from": "human", "value": "<image>\n" * len(picture) + "What?"},
            {"from": "gpt", "value": f"It is {number}."},
        ]
        entries.append({"id": f"s{number}", "conversations": turns, **picture})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return path, images


def prepare(data, out, **options):
    options = {"shard_bytes": 2000, "show_progress": False, "max_image_pixels": 10**6, "name": "d", **options}
    return tfds_llava.prepare(*data, out, **options)


def test_any_number_of_processes_writes_the_same_files(data, tmp_path, monkeypatch):
    monkeypatch.setattr(image_checks, "CHUNK", 4)
    one = prepare(data, tmp_path / "one")
    prepare(data, tmp_path / "three", workers=3)
    assert len(list(one.directory.glob("*array_record*"))) > 3
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")


def test_what_is_wrong_with_an_image_comes_out_of_a_process(data, tmp_path):
    (data[1] / "5.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"sample 's5'.*5\.png"):
        prepare(data, tmp_path / "out", workers=2)
    source = prepare(data, tmp_path / "out", workers=2, broken="skip")
    assert [one["sample"] for one in source.skipped] == ["s5"]
    assert len(source) == 39


def test_checked_images_and_written_shards_are_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr(image_checks, "CHUNK", 4)
    whole = prepare(data, tmp_path / "whole")
    read, written = [], []

    def counted(name, calls, limit, original):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return original(*arguments)

        return call

    out = tmp_path / "out"
    original = image_checks.read_image_file
    monkeypatch.setattr(image_checks, "read_image_file", counted("read", read, 23, original))
    monkeypatch.setattr("mllm_jax.data.source_digest.THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, out)
    kept = (out / "d" / tfds_versions.UNFINISHED).glob("images-*.jsonl")
    assert 0 < sum(path.read_bytes().count(b"\n") for path in kept) < 23
    original = tfds_versions.write_shard
    monkeypatch.setattr(tfds_versions, "write_shard", counted("write", written, 3, original))
    with pytest.raises(KeyboardInterrupt):
        prepare(data, out)
    assert 23 <= len(read) < 23 + 30  # of 30 images
    assert not list((out / "d").glob("*.0.0"))
    seen = len(read)
    prepare(data, out)
    assert len(read) == seen  # all images had been checked
    assert len(written) == 3 + len(list(whole.directory.glob("*array_record*"))) - 2
    assert files_of(out) == files_of(tmp_path / "whole")


def test_shards_of_another_plan_are_not_taken(data, tmp_path, monkeypatch):
    written = []

    def write(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    original = tfds_versions.write_shard
    monkeypatch.setattr(tfds_versions, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out")
    prepare(data, tmp_path / "out", shard_bytes=3000)
    prepare(data, tmp_path / "whole", shard_bytes=3000)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_an_image_that_was_touched_meanwhile_is_looked_at_again(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_versions, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "out")
    monkeypatch.undo()
    Image.new("RGB", (3, 3)).save(data[1] / "1.png")
    changed = prepare(data, tmp_path / "out")
    assert bytes(changed[1].images[0]) == (data[1] / "1.png").read_bytes()
    assert changed.fingerprint == prepare(data, tmp_path / "again").fingerprint


def interrupted(data, out, monkeypatch, **options):
    """Leaves checked images behind."""
    with monkeypatch.context() as patch:
        patch.setattr(tfds_versions, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(data, out, **options)


def test_an_image_of_another_folder_is_looked_at(data, tmp_path, monkeypatch):
    """Also one with the same name, size and time."""
    interrupted(data, tmp_path / "out", monkeypatch)
    other = tmp_path / "other"
    shutil.copytree(data[1], other)
    broken = other / "1.png"
    stat = broken.stat()
    broken.write_bytes(b"x" * stat.st_size)
    os.utime(broken, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ImageError, match=r"other/1\.png"):
        prepare((data[0], other), tmp_path / "out")


def test_a_damaged_journal_is_no_obstacle(data, tmp_path, monkeypatch):
    interrupted(data, tmp_path / "out", monkeypatch)
    (journal,) = (tmp_path / "out" / "d" / tfds_versions.UNFINISHED).glob("images-*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b"\0" * 50 + b"\n", b"[1]\n", b"\xff\n", *lines[3:]]))
    prepare(data, tmp_path / "out")
    prepare(data, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_broken_image_ends_the_work_on_others(data, tmp_path, monkeypatch):
    """While the error is shown nobody goes on."""
    closed = []

    def check_images(*_):
        try:
            yield "5.png", ("digest", ImageError("broken"))
        finally:
            closed.append(True)

    monkeypatch.setattr(tfds_llava, "check_images", check_images)
    with pytest.raises(ImageError, match="broken") as shown:  # keeps the error's frames
        prepare(data, tmp_path / "out")
    assert closed
    del shown


RUN = """
import sys
from mllm_jax.data import tfds_llava
tfds_llava.prepare(*sys.argv[1:4], name="d", shard_bytes=2000, max_image_pixels=10**6, workers=2, show_progress=False)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_is_continued(data, tmp_path, script_environment):
    prepare(data, tmp_path / "whole")
    out, delay, kills = tmp_path / "out", 1.0, 0
    command = [sys.executable, "-c", RUN, *map(str, data), str(out)]
    while True:
        process = subprocess.Popen(command, env=script_environment | {"JAX_PLATFORMS": "cpu"})
        try:
            assert process.wait(delay) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            delay, kills = delay + 0.7, kills + 1
    assert kills
    assert files_of(out) == files_of(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- the processes


def test_processes_work_in_order_and_hand_errors_on(tmp_path):
    with worker_processes("math:comb", 2, 4) as choose:
        assert [n for _, n in map_in_order(choose, range(5), threads=2)] == [1, 4, 6, 4, 1]
        with pytest.raises(ValueError, match="non-negative"):
            choose(-1)
    with worker_processes("json:loads", 1) as loads, pytest.raises(json.JSONDecodeError):
        loads("{")
    with (
        worker_processes("os:_exit", 1) as leave,
        pytest.raises(RuntimeError, match=r"ended early.*fewer --workers"),
    ):
        leave(3)


ORPHAN = """
import os, time
from mllm_jax.data.worker_processes import worker_processes
with worker_processes("os:getpid", 1) as pid:
    print("started", flush=True)
    time.sleep(60)
"""


def test_processes_end_with_the_one_that_started_them(script_environment):
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN], env=script_environment, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    worker = int(children.read_text().split()[0])
    process.kill()
    process.communicate()
    for _ in range(200):
        if not pathlib.Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlives its parent")


# --------------------------------------------------------------------------------------------------------- lengths


class Encoder(RowEncoder):
    """Stands for a `RowEncoder` in processes of their own."""

    tokenizer = tiny.make_tokenizer()
    template = visual_layout = ""
    read_image = type("Reader", (), {"compat": None})

    def __init__(self, log):
        self.log = log

    def needs(self, sample):
        with open(self.log, "a") as file:
            file.write(f"{sample.id}\n")
        return np.array([len(sample.id), 0, 1, 1])


def test_lengths_are_measured_in_processes_and_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CHUNK", 7)
    source, folder, log = prepare(data, tmp_path / "out"), tmp_path / "sizes", tmp_path / "log"
    chunks = []
    original = measure._keep

    def keep(path, found):
        chunks.append(path)
        if len(chunks) == 4:
            raise KeyboardInterrupt
        return original(path, found)

    monkeypatch.setattr(measure, "_keep", keep)
    with pytest.raises(KeyboardInterrupt):
        measure.sizes(source, Encoder(log), folder, threads=1)
    measured = set(log.read_text().split())
    found = measure.sizes(source, Encoder(log), folder, threads=1, workers=1)
    assert [int(n) for n in found[:, 0]] == [len(source[i].id) for i in range(40)]
    repeated = [line for line in log.read_text().split()[len(measured) :] if line in measured]
    assert len(repeated) <= 7  # the chunk that was not kept
    assert [path.suffix for path in folder.iterdir()] == [".int32"]
    here = pathlib.Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")  # where processes find this file
    again = measure.sizes(source, Encoder(log), tmp_path / "other", threads=1, workers=2)
    np.testing.assert_array_equal(again, found)
    assert [p.read_bytes() for p in (tmp_path / "other").iterdir()] == [
        p.read_bytes() for p in folder.iterdir()
    ]


def test_a_data_error_of_a_worker_keeps_its_kind(data, tmp_path):
    (data[1] / "9.png").unlink()
    with pytest.raises(DataError, match=r"9\.png"):
        prepare(data, tmp_path / "out", workers=2)
