"""`mllm-jax prepare`, and training on nothing but what it wrote."""

import functools
import json
import shutil

import pytest
import test_train
import tiny

from mllm_jax.cli.prepare import prepare
from mllm_jax.config import ConfigError
from mllm_jax.data import measure
from mllm_jax.evaluation.selection import select_benchmarks
from mllm_jax.training.prepared import FILE, find_prepared


@pytest.fixture
def moved(tiny_checkpoints, tiny_data, tmp_path):
    """A recipe on a copy of the data that can be taken away, whose second stage is packed."""
    data = {}
    for name, (path, images) in tiny_data.items():
        folder = tmp_path / "raw" / name
        shutil.copytree(images, folder / "images")
        data[name] = (shutil.copy(path, folder / path.name), folder / "images")
    config = tiny.recipe(tiny_checkpoints, data)
    config.stages.finetune.samples_per_row = 2
    config.stages.finetune.accumulation = 1
    return config


@pytest.mark.slow
def test_prepared_data_train_the_same_without_their_sources(train, moved, tmp_path, monkeypatch, capsys):
    expected = train.train(moved, tmp_path / "run", evaluate=False)
    prepare(moved.copy_and_resolve_references(), tmp_path / "data", workers=2)
    said = capsys.readouterr().out
    assert "stage finetune: samples of instructions " in said
    assert "--config.data.prepared" in said
    shutil.rmtree(tmp_path / "raw")
    monkeypatch.setattr(measure, "map_in_order", lambda *_: pytest.fail("measured again"))
    moved.data.dir, moved.data.prepared = str(tmp_path / "data"), True
    params = train.train(moved, tmp_path / "again", evaluate=False)
    test_train.assert_same_bits(params, expected)
    assert test_train.curve(tmp_path / "again") == test_train.curve(tmp_path / "run")


def test_a_second_preparation_writes_nothing(moved, tmp_path):
    prepare(moved, tmp_path / "data", workers=1)
    before = test_train.files_of(tmp_path / "data")
    prepare(moved, tmp_path / "data", workers=1)
    assert test_train.files_of(tmp_path / "data") == before


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.seq_len", 79, r"it was prepared with data\.seq_len = 80, not 79"),
        (
            "stages.pretrain.template",
            "mini",
            r"it was prepared with stages\.pretrain\.template = 'plain', not 'mini'",
        ),
        (
            "model.connector.average_pool.tokens",
            1,
            r"prepared with model\.connector\.average_pool = {.*'tokens': 4",
        ),
    ],
)
def test_data_that_were_prepared_otherwise_are_refused(train, moved, tmp_path, key, value, said):
    prepare(moved.copy_and_resolve_references(), tmp_path / "data", workers=1)
    moved.data.dir, moved.data.prepared = str(tmp_path / "data"), True
    with moved.unlocked():
        moved.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=said + r".*run `mllm-jax prepare`"):
        train.train(moved, tmp_path / "run", evaluate=False)


def test_data_that_were_prepared_for_another_tower_are_refused(moved, tiny_checkpoints, tmp_path):
    prepare(moved.copy_and_resolve_references(), tmp_path / "data", workers=1)
    find = functools.partial(find_prepared, moved, "pretrain", "captions", tmp_path / "data")
    tower = tiny_checkpoints["vision"]
    moved.model.vision.path = f"elsewhere/{tower.name}"
    assert len(find())
    moved.model.vision.path = f"{tower}+{tower}"
    with pytest.raises(ConfigError, match=rf"model\.vision\.path = '{tower.name}', not '{tower.name}\+"):
        find()
    moved.model.vision.path = str(tower)
    moved.model.vision.max_patches = 64
    with pytest.raises(ConfigError, match=r"model\.vision\.max_patches = 0, not 64"):
        find()


def test_data_that_were_not_prepared_or_are_gone_are_named(train, moved, tmp_path):
    moved.data.dir, moved.data.prepared = str(tmp_path / "data"), True
    with pytest.raises(ConfigError, match=r"'captions' of stage 'pretrain': it was not prepared"):
        train.train(moved, tmp_path / "run", evaluate=False)
    prepare(moved.copy_and_resolve_references(), tmp_path / "data", workers=1)
    shutil.rmtree(tmp_path / "data" / "source_captions")
    with pytest.raises(ConfigError, match=r"source_captions are gone"):
        train.train(moved, tmp_path / "again", evaluate=False)


def test_benchmarks_are_prepared_too(moved, tmp_path, capsys):
    files = tiny.write_benchmarks(tmp_path / "files")
    chosen = select_benchmarks(["pope"], str(files), str(tmp_path / "data" / "benchmarks"))
    prepare(moved, tmp_path / "data", workers=1, benchmarks=chosen)
    assert "benchmark pope: 3 questions" in capsys.readouterr().out
    assert any((tmp_path / "data" / "benchmarks" / "pope").glob("1.0.0/*array_record*"))


@pytest.mark.slow
def test_the_command_prepares_a_recipe(run_script, tmp_path):
    arguments = ["-m", "mllm_jax.cli.main", "prepare", "--config=configs/quickstart.py", "--workers=2"]
    arguments += [
        f"--config.stages.{s}.sources.{n}.count=30"
        for s, n in (("pretrain", "captions"), ("finetune", "instructions"))
    ]
    refused = run_script(*arguments)
    assert refused.returncode == 1
    assert "'data.dir' is not set" in refused.stderr
    done = run_script(*arguments, f"--workdir={tmp_path}/run", "--config.eval.benchmarks.mini.count=1")
    assert done.returncode == 0, done.stderr
    notes = json.loads((tmp_path / "run" / "data" / FILE).read_text())
    assert [(note["stage"], note["source"]) for note in notes] == [
        ("pretrain", "captions"),
        ("finetune", "instructions"),
    ]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"data"}
    assert any((tmp_path / "run" / "data").glob("mini_benchmark_*/mini.json"))
    help_text = run_script("-m", "mllm_jax.cli.main", "prepare", "--help")
    assert "mllm-jax prepare --config=" in help_text.stdout
