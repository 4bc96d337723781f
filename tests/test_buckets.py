"""A work directory in a bucket: nothing to append to, nothing to rename, nothing to lock (emulator: `object_store`)."""

import json
import os
import re
import threading

import object_store
import pytest
import test_train
import tiny
from absl.testing import flagsaver

from mllm_jax import bucket_copy, bucket_lock, files, line_file, lock, storage
from mllm_jax.bucket_copy import local_copy
from mllm_jax.cli.main import main
from mllm_jax.cli.prepare import prepare
from mllm_jax.config import ConfigError
from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.inference import runs
from mllm_jax.interop import checkpoints
from mllm_jax.lock import LockLostError

# Clients of Google's that leave their connections to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def bucket():
    server, environment = object_store.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield storage.as_path(f"gs://{object_store.BUCKET}")
    from tensorboardX.record_writer import GCSRecordWriter  # imports torch where that is installed

    GCSRecordWriter.__del__ = lambda _: (
        None
    )  # it would write once more when Python ends, and try so for minutes
    server.shutdown()


# ------------------------------------------------------------------------------------------------------ objects


def test_objects_are_written_whole_or_not_at_all(bucket):
    path = bucket / "a" / "file.txt"
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"half" * (1 // 0))
    assert not path.exists()
    files.write_text(path, "é")
    files.write_text(path, "whole é")
    assert (storage.read_text(path), storage.size(path)) == ("whole é", 8)
    assert (path.is_file(), path.parent.is_dir()) == (True, True)
    assert (
        [p.name for p in path.parent.iterdir()] == [p.name for p in path.parent.glob("*.txt")] == ["file.txt"]
    )
    with pytest.raises(FileNotFoundError):
        storage.read_text(bucket / "a" / "none.txt")
    storage.remove_folder(path.parent)
    assert not path.parent.exists()


def test_lines_survive_what_is_asked_for_and_what_takes_long(bucket, monkeypatch):
    path = bucket / "lines" / "a.jsonl"
    file = line_file.LineFile(path)
    file.append("1")
    assert not path.exists()
    file.sync()
    file.append("2")  # of a process that is killed now
    assert line_file.whole_lines(path) == b"1\n"
    monkeypatch.setattr(line_file, "INTERVAL", 0.0)
    monkeypatch.setattr(line_file, "SHARE", 1e9)
    again = line_file.LineFile(path)
    again.append("3")
    again.append("4")
    assert line_file.whole_lines(path) == b"1\n3\n4\n"
    again.close()
    again.append("5")
    again.close()
    assert line_file.whole_lines(path, repair=True) == b"1\n3\n4\n5\n"


# -------------------------------------------------------------------------------------------------------- the lock


def leave(directory, **changes):
    """A lock that another process has left, or holds."""
    files.write_text(directory / "lock", json.dumps({**lock.this_process(), **changes}))


def test_the_lock_names_its_holder_keeps_others_out_and_is_removed(bucket, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    directory = bucket / "locked"
    with bucket_lock.locked(directory) as held:
        first = held._generation
        holder = json.loads(storage.read_text(directory / "lock"))
        assert holder["process"] == os.getpid()
        with pytest.raises(ConfigError, match=rf"locked is in use by process {os.getpid()} on"):
            bucket_lock.BucketLock(directory).acquire()
        for _ in range(200):
            held.check()
            if held._generation != first:  # it beats, and is still held
                break
            threading.Event().wait(0.02)
        assert held._generation != first
    assert not (directory / "lock").exists()


def test_a_lock_of_a_process_that_is_gone_is_taken_over(bucket, monkeypatch):
    directory = bucket / "left"
    leave(directory, process=2**22 + 1)  # more than Linux gives
    with bucket_lock.locked(directory):
        assert json.loads(storage.read_text(directory / "lock"))["process"] == os.getpid()
    monkeypatch.setattr(lock, "PATIENCE", 1.5)
    leave(directory, host="elsewhere")
    with bucket_lock.locked(directory):
        assert json.loads(storage.read_text(directory / "lock"))["host"] != "elsewhere"


def test_a_holder_elsewhere_that_shows_life_keeps_it(bucket, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 60.0)
    directory = bucket / "elsewhere"
    leave(directory, host="elsewhere")
    beat = threading.Timer(0.5, leave, [directory], {"host": "elsewhere"})
    beat.start()
    with (
        pytest.raises(ConfigError, match=r"in use by process .* on elsewhere"),
        bucket_lock.locked(directory),
    ):
        pass
    beat.join()
    assert json.loads(storage.read_text(directory / "lock"))["host"] == "elsewhere"


def test_a_lock_that_was_lost_is_neither_renewed_nor_removed(bucket, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 60.0)
    directory = bucket / "lost"
    with bucket_lock.locked(directory) as held:
        leave(directory, host="elsewhere")
        with pytest.raises(Exception, match="412"):
            held.beat()
        with pytest.raises(LockLostError, match=r"was taken over by process .* on elsewhere"):
            held.check()
    assert json.loads(storage.read_text(directory / "lock"))["host"] == "elsewhere"
    with bucket_lock.locked(bucket / "removed") as held:
        (bucket / "removed" / "lock").unlink()
        with pytest.raises(LockLostError, match="is gone"):
            held.check()
    assert not (bucket / "removed" / "lock").exists()


def test_a_lock_that_was_written_without_an_answer_is_held(bucket, monkeypatch):
    """A request is sent again when its answer is lost; then the generation is another one than expected."""
    monkeypatch.setattr(lock, "BEAT", 60.0)

    def put(self, generation):
        blob = self._bucket.blob(self._name)
        blob.upload_from_string(self._text, if_generation_match=generation)
        blob.upload_from_string(self._text, if_generation_match=generation)  # answered with 412

    original = bucket_lock.BucketLock._put
    monkeypatch.setattr(bucket_lock.BucketLock, "_put", put)
    with bucket_lock.locked(bucket / "unanswered") as held:
        held.check()
        with pytest.raises(Exception, match="412"):
            held.beat()
        held.check()
        monkeypatch.setattr(bucket_lock.BucketLock, "_put", original)
        held.beat()
        held.check()
    assert not (bucket / "unanswered" / "lock").exists()


def test_of_several_that_want_the_lock_one_gets_it(bucket):
    directory, held, refused = bucket / "wanted", [], []

    def take():
        one = bucket_lock.BucketLock(directory)
        try:
            one.acquire()
            held.append(one)
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)
    held[0].check()


# ----------------------------------------------------------------------------------------- what is copied from there


@pytest.fixture
def copies(monkeypatch, tmp_path):
    """Where copies are kept, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local_copy.cache_clear()
    yield bucket_copy.home()
    local_copy.cache_clear()


def copied(capsys):
    """How many files the copies since the last call have copied."""
    local_copy.cache_clear()
    return sum(int(found) for found in re.findall(r"copying (\d+) files", capsys.readouterr().out))


def test_a_folder_is_copied_once_and_then_what_has_changed(bucket, copies, capsys):
    there = bucket / "data"
    for name in ("a.txt", "b/c.txt", "b/d.txt"):
        files.write_text(there / name, name)
    folder = local_copy(there)
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.txt")} == {
        name: name for name in ("a.txt", "b/c.txt", "b/d.txt")
    }
    assert copied(capsys) == 3
    (folder / "sizes").write_text("made here")
    assert local_copy(there) == folder
    assert copied(capsys) == 0
    files.write_text(there / "a.txt", "other")  # of the same size: the generation tells
    (there / "b" / "c.txt").unlink()
    (folder / "b" / "d.txt").write_text("cut o")
    local_copy(there)
    assert copied(capsys) == 2
    assert (folder / "a.txt").read_text() == "other"
    assert (folder / "b" / "d.txt").read_text() == "b/d.txt"
    assert not (folder / "b" / "c.txt").exists()
    assert (folder / "sizes").read_text() == "made here"
    assert local_copy(there / "a.txt") == folder / "a.txt"
    assert copied(capsys) == 0


def test_a_copy_that_was_stopped_goes_on(bucket, copies, capsys, monkeypatch):
    there, replace, done = bucket / "stopped", os.replace, []
    for number in range(4):
        files.write_text(there / f"{number}.txt", f"{number}")

    def stops(source, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(bucket_copy, "THREADS", 1)
    monkeypatch.setattr(bucket_copy.os, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        local_copy(there)
    monkeypatch.setattr(bucket_copy.os, "replace", replace)
    capsys.readouterr()
    folder = local_copy(there)
    assert copied(capsys) == 2
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".jsonl") == [
        f"{number}.txt" for number in range(4)
    ]


def test_what_cannot_be_copied_is_named(bucket, copies, monkeypatch):
    with pytest.raises(FileNotFoundError, match="gs://bucket/nothing holds nothing"):
        local_copy(bucket / "nothing")
    files.write_text(bucket / "large" / "a", "text")
    usage = bucket_copy.shutil.disk_usage("/")._replace(free=3)
    monkeypatch.setattr(bucket_copy.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"gs://bucket/large needs 4 B in .* where 3 B are free; make room"):
        local_copy(bucket / "large")
    assert bucket_copy._leads_out("a/../../b")
    assert bucket_copy._leads_out("a//b")
    assert not bucket_copy._leads_out("a..b/c")


def test_a_weight_file_comes_with_what_says_of_which_model_it_is(bucket, copies):
    """Else a connector would be taken over into another model without a word."""
    for name in ("projector.bin", "config.json", "other.bin"):
        (bucket / "stage1" / name).write_text(name)
    found = checkpoints._with_description(bucket / "stage1" / "projector.bin")
    assert found.read_text() == "projector.bin"
    assert {file.name for file in found.parent.iterdir()} >= {"projector.bin", "config.json"}
    assert not (found.parent / "other.bin").exists()


def test_data_are_not_prepared_in_a_bucket(train, tiny_config, bucket, copies):
    tiny_config.data.dir = f"{bucket}/data"
    with pytest.raises(
        ConfigError, match=r"'data\.dir' is gs://bucket/data, .* give --config\.data\.prepared"
    ):
        train.train(tiny_config, bucket / "not_prepared", evaluate=False)


def upload(folder, there):
    for path in folder.rglob("*"):
        if path.is_file():
            files.write_bytes(there / path.relative_to(folder).as_posix(), path.read_bytes())


@pytest.mark.slow
def test_a_run_trains_from_checkpoints_and_prepared_data_in_a_bucket(
    train, tiny_checkpoints, tiny_data, bucket, copies, tmp_path
):
    config = tiny.recipe(tiny_checkpoints, tiny_data)
    prepare(config, tmp_path / "data", workers=1)
    config.data.prepared = True
    train.train(config, tmp_path / "local", evaluate=False)
    upload(tmp_path / "data", bucket / "prepared")
    for name, path in tiny_checkpoints.items():
        upload(path, bucket / "models" / name)
        config.model[name].path = f"{bucket}/models/{name}"
    config.data.dir = f"{bucket}/prepared"
    train.train(config, bucket / "from_bucket", evaluate=False)
    assert test_train.curve(bucket / "from_bucket") == test_train.curve(tmp_path / "local")
    assert main(["inspect", f"{bucket}/models/llm"]) == 0


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_bucket_needs_a_local_folder_for_data(train, tiny_config, bucket):
    with pytest.raises(ConfigError, match=r"'data\.dir' is not set .* give --config\.data\.dir=FOLDER"):
        train.train(tiny_config, bucket / "no_data", evaluate=False)
    assert not (bucket / "no_data").exists()


@pytest.fixture(scope="module")
def finished(train, bucket, tmp_path_factory, tiny_checkpoints, tiny_data):
    """(config, work directory) of a run in the bucket that was killed in its second stage and continued."""
    config = tiny.recipe(tiny_checkpoints, tiny_data)
    root = tmp_path_factory.mktemp("bucket")
    config.data.dir = str(root / "data")
    expected = train.train(config, root / "local", evaluate=False)
    directory, steps = bucket / "run", []

    def to_device(*arguments):
        steps.append(arguments)
        if len(steps) == test_train.STEPS + 4:
            raise KeyboardInterrupt
        return original(*arguments)

    original = train.to_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "to_device", to_device)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, directory, evaluate=False)
    found = read_metrics(directory / "metrics.jsonl")
    assert [record["step"] for record in found["pretrain"]] == list(range(1, test_train.STEPS + 1))
    assert [record["step"] for record in found["finetune"]] == [1, 2, 3]
    assert runs.finished_stages(directory, config) == ["pretrain"]
    params = train.train(config, directory, evaluate=False)
    test_train.assert_same_bits(params, expected)
    assert test_train.curve(directory) == test_train.curve(root / "local")
    return config, directory


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(finished):
    _, directory = finished
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "params",
        "sources.json",
        "loss.png",
    }
    assert "lock" not in names
    assert list((directory / "tensorboard" / "finetune").glob("events*"))


@pytest.mark.slow
def test_parameters_that_were_not_written_whole_do_not_count(train, finished):
    config, directory = finished
    before = test_train.load_whole(directory / "params" / "finetune")
    (directory / "params" / "finetune" / "commit_success.txt").unlink()
    assert runs.finished_stages(directory, config) == ["pretrain"]
    train.train(config, directory, evaluate=False)
    assert runs.finished_stages(directory, config) == ["pretrain", "finetune"]
    test_train.assert_same_bits(test_train.load_whole(directory / "params" / "finetune"), before)


@pytest.mark.slow
def test_a_run_is_exported(finished, bucket, tmp_path, capsys, monkeypatch):
    _, directory = finished
    assert main(["export", f"--from={directory}", f"--to={tmp_path}/out", "--format=orbax"]) == 0
    assert (tmp_path / "out" / "model.json").is_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files.write_text(bucket / "no_model" / "config.json", "{}")
    assert main(["export", f"--from={bucket}/no_model", f"--to={tmp_path}/other"]) == 1
    assert "no_model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_evaluated_reported_and_scored(finished, eval_script, tmp_path, capsys):
    _, directory = finished
    values = {"benchmarks": ["mmbench", "pope"], "data_dir": str(tiny.write_benchmarks(tmp_path))}
    values |= {"workdir": str(directory), "likelihood": True, "max_new_tokens": 4, "batch_size": 8}
    with flagsaver.flagsaver(**values):
        eval_script.main([])
    out = directory / "eval"
    answers = out / "mmbench" / "predictions.jsonl"
    before = answers.read_bytes()
    assert before.count(b"\n") == 5
    assert (out / "mmbench" / "submission" / "mmbench.xlsx").read_bytes()[:2] == b"PK"
    files.write_bytes(answers, b"".join(before.splitlines(keepends=True)[:3]))  # stopped in the middle
    with flagsaver.flagsaver(**values):
        eval_script.main([])
    assert answers.read_bytes() == before
    capsys.readouterr()
    assert (
        main(
            ["score", "mmbench", f"--predictions={answers}", f"--annotations={out}/mmbench/annotations.json"]
        )
        == 0
    )
    scored = json.loads(capsys.readouterr().out)
    summary = json.loads((out / "summary.json").read_bytes())["benchmarks"]
    assert scored["score"] == summary["mmbench"]["scores"]["score"]
    assert main(["report", str(directory), f"--out={directory}/report"]) == 0
    page = storage.read_text(directory / "report" / "report.html")
    assert "data:image/png;base64" in page
    assert main(["report", str(directory), f"--out={tmp_path}/report"]) == 0
    assert (tmp_path / "report" / "report.html").is_file()
