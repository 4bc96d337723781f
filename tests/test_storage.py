"""Paths as users type them: the home directory, and what is not on this machine. Buckets: `test_buckets`."""

import os

import pytest

from mllm_jax import storage
from mllm_jax.cli.main import main
from mllm_jax.evaluation.grouping import load_groups
from mllm_jax.interop.hub import read_json
from mllm_jax.schema import Key


@pytest.fixture
def gcsfs(monkeypatch):
    """The package is taken for installed, and not used."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "gcsfs")
    monkeypatch.setattr(storage, "_prepare", lambda: None)


def test_home_is_expanded_wherever_an_argument_may_hold_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    given = ["--workdir=~/run", "~/data", "~", "--name", "a~b", "--json=", "--url=https://x", "-x=~", "C:\\~"]
    wanted = ["--workdir=/home/ada/run", "/home/ada/data", "/home/ada", *given[3:7], "-x=/home/ada", given[8]]
    assert storage.expand_arguments(given) == wanted


@pytest.mark.parametrize("path", ["gs://b/run", "s3://b", "abfss://c@d/e", "hdfs://n/x"])
def test_object_storage_is_refused_by_name(path):
    with pytest.raises(ValueError, match=f"^{path} is object storage"):
        storage.local_path(path)
    with pytest.raises(ValueError, match=f"^--json: {path} is object storage"):
        storage.expand_arguments([f"--json={path}"], buckets=("workdir", ""))


def test_a_bucket_is_taken_where_it_can_be_used_and_other_storage_nowhere(gcsfs):
    for given in (["--workdir=gs://b/run"], ["--workdir", "gs://b/run"], ["-x", "y", "--workdir=gs://b/run"]):
        assert storage.expand_arguments(given, buckets=("workdir",)) == given
    assert storage.expand_arguments(["gs://b/run"], buckets=("",)) == ["gs://b/run"]
    with pytest.raises(ValueError, match=r"^--json: gs://b/x is object storage, and only a work directory, "):
        storage.expand_arguments(["--json", "gs://b/x"], buckets=("workdir", ""))
    with pytest.raises(ValueError, match=r"^--workdir: s3://b/run is object storage that is not supported"):
        storage.expand_arguments(["--workdir=s3://b/run"], buckets=("workdir",))
    with pytest.raises(ValueError, match=r"^--workdir: gs:// names no bucket"):
        storage.expand_arguments(["--workdir=gs://"], buckets=("workdir",))
    for path in ("s3://b/run", "hdfs://n/x"):
        with pytest.raises(ValueError, match="not supported"):
            storage.as_path(path)


def test_what_a_bucket_needs_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^gs://bucket/run is in a bucket, .*pip install 'mllm-jax\[gcs\]'"):
        storage.as_path("gs://bucket/run")


def test_a_key_of_the_configuration_says_what_is_wrong_with_its_bucket(gcsfs):
    key = Key("", help="", path=True, bucket=True)
    assert key.problem("gs://bucket/run") is None
    assert key.problem("gs://") == "is 'gs://': it names no bucket; write gs://BUCKET/FOLDER"
    assert key.problem("s3://b").startswith("is 's3://b': it is object storage that is not supported")


def test_a_path_in_a_bucket_never_becomes_a_local_one(gcsfs):
    path = storage.as_path("gs://bucket/run") / "eval"
    for made in (path, storage.absolute(path), storage.resolve(path), storage.as_path(path)):
        assert str(made) == "gs://bucket/run/eval"
        assert storage.is_bucket(made)
    assert (storage.make_folder(path), path.parent.name) == (None, "run")


def test_a_file_is_no_folder(tmp_path):
    storage.make_folder(tmp_path / "a" / "b")
    storage.make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file; give a folder"):
        storage.make_folder(tmp_path / "file")


def test_verbs_expand_home_and_refuse_object_storage(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    main(["validate", "--json=~/data.json"])
    assert f"{tmp_path}/data.json" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit) as stop:
        main(["validate", "--json=gs://bucket/data.json"])
    assert stop.value.code == 2
    assert "--json: gs://bucket/data.json is object storage" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["data.json"]


def test_byte_order_marks_are_accepted_in_configurations_of_others(tmp_path):
    """Windows editors write them; data and answer files have tests of their own."""
    path = tmp_path / "file.json"
    path.write_text('\ufeff{"a": {}}', encoding="utf-8")
    assert read_json(path) == {"a": {}}
    assert load_groups(path) == {"a": {}}
