"""Paths as users type them: the home directory, and what is not on this machine."""

import os

import pytest

from mllm_jax.cli.main import main
from mllm_jax.evaluation.grouping import load_groups
from mllm_jax.interop.hub import read_json
from mllm_jax.local_path import local_arguments, local_path


def test_home_is_expanded_wherever_an_argument_may_hold_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    given = ["--workdir=~/run", "~/data", "~", "--name", "a~b", "--json=", "--url=https://x", "-x=~", "C:\\~"]
    wanted = ["--workdir=/home/ada/run", "/home/ada/data", "/home/ada", *given[3:7], "-x=/home/ada", given[8]]
    assert local_arguments(given) == wanted


@pytest.mark.parametrize("path", ["gs://b/run", "s3://b", "abfss://c@d/e", "hdfs://n/x"])
def test_object_storage_is_refused_by_name(path):
    with pytest.raises(ValueError, match=f"^{path} is object storage, which is not supported"):
        local_path(path)
    with pytest.raises(ValueError, match=f"^--workdir: {path} is object storage"):
        local_arguments([f"--workdir={path}"])


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
