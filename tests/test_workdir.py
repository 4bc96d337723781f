"""A work directory belongs to one configuration, and to one run at a time."""

import json
import os
import pathlib
import re

import pytest

from mllm_jax import workdir
from mllm_jax.config import ConfigError, benchmark_config, resolved
from mllm_jax.lock import LockLostError
from mllm_jax.workdir import check_same, open_run, saved_config


def start(directory, config):
    """A run of `config` that ends at once."""
    with open_run(directory, resolved(config)):
        pass


def history(directory):
    return [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]


def test_the_same_configuration_may_come_back(tiny_config, tmp_path):
    run = tmp_path / "deep" / "run"
    start(run, tiny_config)
    assert json.loads((run / "config.json").read_text()) == resolved(tiny_config)
    (run / "metrics.jsonl").write_text("{}\n")
    start(run, tiny_config)
    assert {path.name for path in run.iterdir()} == {"config.json", "history.jsonl", "metrics.jsonl"}
    assert [(begun["changed"], begun["directory"]) for begun in history(run)] == [({}, os.getcwd())]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: c.update({"seed": 8}), "seed = 7, not 8;"),
        (
            lambda c: (c.update({"seed": 8}), c.model.connector.update({"name": "linear"})),
            "model.connector.name = 'average_pool', not 'linear' "
            "(also other: model.connector.average_pool.tokens, seed);",
        ),
        (
            lambda c: c.stages.finetune.update({"trainable": ("llm/.*",)}),
            "stages.finetune.trainable = ['connector/.*', 'llm/.*'], not ['llm/.*'];",
        ),
        (lambda c: c.stages.pretrain.update({"steps": 7}), "stages.pretrain.steps = 6, not 7;"),
        (
            lambda c: c.stages.pretrain.sources.update({"more": {"json": "b"}}),
            "stages.pretrain.sources.more = None, not",
        ),
        (lambda c: c.model.llm.update({"path": "elsewhere"}), "model.llm.path = "),
    ],
)
def test_another_configuration_is_refused_and_the_most_telling_key_named(tiny_config, tmp_path, change, key):
    start(tmp_path, tiny_config)
    before = (tmp_path / "config.json").read_bytes()
    with tiny_config.unlocked():
        change(tiny_config)
    with pytest.raises(ConfigError, match=re.escape(f"holds a run with {key}")):
        start(tmp_path, tiny_config)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_does_not_alter_training_may_change_and_is_recorded(tiny_config, tmp_path):
    start(tmp_path, tiny_config)
    tiny_config.mesh.fsdp = 2
    tiny_config.data.threads = 3
    tiny_config.stages.pretrain.sources.captions.duplicate_ids = "number"
    tiny_config.stages.pretrain.sources.captions.json = (
        "copied/again.json"  # its content is compared, not its place
    )
    tiny_config.data.overlong = "skip"  # go on past a sample that has stopped the run
    tiny_config.eval.max_new_tokens = 5
    tiny_config.stages.pretrain.checkpoint_every = 3
    # after an out-of-memory
    tiny_config.stages.finetune.accumulation = 4
    tiny_config.model.llm.remat = "full"
    tiny_config.eval.batch_size = 1
    start(tmp_path, tiny_config)
    assert json.loads((tmp_path / "config.json").read_text()) == resolved(tiny_config)
    changed = history(tmp_path)[1]["changed"]
    assert changed["stages.finetune.accumulation"] == [2, 4]
    assert changed["model.llm.remat"] == ["none", "full"]
    assert len(changed) == 10


@pytest.mark.parametrize(
    ("key", "before", "now", "says"),
    [
        ("eval.benchmarks.mini.count", 0, 3, "given with eval.benchmarks.mini.count = 0, not 3"),
        ("eval.template", "vicuna_v1", "mini", "given with eval.template = 'vicuna_v1', not 'mini'"),
        ("eval.max_new_tokens", 8, 5, "given with eval.max_new_tokens = 8, not 5"),
        ("eval.max_new_tokens", 9, 5, None),  # the answers, of at most 8 tokens, had a limit of their own
        (
            "eval.benchmarks.mini.max_new_tokens",
            0,
            9,
            "given with eval.benchmarks.mini.max_new_tokens = 0, not 9",
        ),
        ("eval.benchmarks.mini.max_new_tokens", 0, 8, None),
        ("eval.benchmarks.mini.seed", 1, 2, "given with eval.benchmarks.mini.seed = 1, not 2"),
        ("eval.benchmarks.mini.seed", None, 7, None),  # that of the data
        ("eval.overlong", "error", "empty", "given with eval.overlong = 'error', not 'empty'"),
        ("eval.template", "plain", "mini", None),  # the answers are of another program
        ("eval.benchmarks.mini.images", "", "moved", None),
        ("eval.benchmarks.other.count", 0, 3, None),
        ("eval.likelihood", False, True, None),
        ("eval.batch_size", 4, 2, None),
    ],
)
def test_answers_are_not_mixed_with_those_to_other_questions(tiny_config, tmp_path, key, before, now, says):
    with tiny_config.unlocked():
        tiny_config.eval.benchmarks = {name: benchmark_config() for name in ("mini", "other")}
        tiny_config.eval.template = "vicuna_v1"
        tiny_config.data.seed = 7
        tiny_config.update_from_flattened_dict({key: before})
        start(tmp_path, tiny_config)
        saved = (tmp_path / "config.json").read_bytes()
        (tmp_path / "eval" / "mini").mkdir(parents=True)
        (tmp_path / "eval" / "mini" / "manifest.json").write_text(
            '{"max_new_tokens": 8, "template": "vicuna_v1"}'
        )
        tiny_config.update_from_flattened_dict({key: now})
    if says is None:
        start(tmp_path, tiny_config)
        return
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'eval' / 'mini'} holds answers {says}")):
        start(tmp_path, tiny_config)
    assert (tmp_path / "config.json").read_bytes() == saved
    tiny_config.seed += 1
    # Another run's answers are not said to be in the way.
    with pytest.raises(ConfigError, match="holds a run with seed"):
        start(tmp_path, tiny_config)
    tiny_config.seed -= 1
    (tmp_path / "eval" / "mini").rename(tmp_path / "eval_before")
    start(tmp_path, tiny_config)


def test_a_value_that_changed_after_the_answers_is_not_theirs(tiny_config, tmp_path):
    """The configuration was written over by an evaluation that was then refused."""
    with tiny_config.unlocked():
        tiny_config.eval.benchmarks = {"mini": benchmark_config()}
        tiny_config.eval.benchmarks.mini.count = 3
        start(tmp_path, tiny_config)
        manifest = tmp_path / "eval" / "mini" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text('{"max_new_tokens": 8}')
        os.utime(manifest, (1e9, 1e9))
        line = {
            "time": "2026-11-29T19:31:05+0000",
            "directory": "/",
            "changed": {"eval.benchmarks.mini.count": [40, 3]},
        }
        with open(tmp_path / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        tiny_config.eval.benchmarks.mini.count = 40
    start(tmp_path, tiny_config)


def test_a_change_is_recorded_before_it_takes_place(tiny_config, tmp_path, monkeypatch):
    """A disk that is full in between: the next start finds the same change again."""
    start(tmp_path, tiny_config)
    tiny_config.data.threads = 3

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workdir.files, "write_text", full)
        for directory in (tmp_path, tmp_path / "new"):  # also the very first start
            with pytest.raises(OSError, match="No space"):
                start(directory, tiny_config)
    start(tmp_path, tiny_config)
    assert [list(begun["changed"]) for begun in history(tmp_path)] == [[], ["data.threads"], ["data.threads"]]
    start(tmp_path / "new", tiny_config)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "history.jsonl"}


def test_a_run_asks_whether_the_directory_is_still_its_own(tiny_config, tmp_path):
    with open_run(tmp_path, resolved(tiny_config)) as check_held:
        check_held()
        (tmp_path / "lock").write_text('{"host": "elsewhere", "process": 1}')
        with pytest.raises(LockLostError, match="process 1 on elsewhere"):
            check_held()


def test_a_run_from_before_a_key_existed_is_one_with_its_default(tiny_config, tmp_path):
    old = resolved(tiny_config)
    for stage in old["stages"].values():
        del stage["lora"], stage["quantize_base"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    start(tmp_path, tiny_config)
    (tmp_path / "config.json").write_text(json.dumps(old))
    tiny_config.stages.finetune.lora.rank = 4
    with pytest.raises(ConfigError, match=re.escape("holds a run with stages.finetune.lora.rank = 0, not 4")):
        start(tmp_path, tiny_config)


@pytest.mark.parametrize("name", ["thesis.txt", "params", "train.log/x", "metrics.jsonl"])
def test_a_directory_of_something_else_is_refused(tiny_config, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    (tmp_path / ".DS_Store").write_text("")
    top = name.split("/")[0]
    with pytest.raises(ConfigError, match=re.escape(f"is not empty ({top}) and holds no run")):
        start(tmp_path, tiny_config)
    assert {path.name for path in tmp_path.iterdir()} == {top, ".DS_Store"}


def test_logs_and_what_systems_leave_do_not_count(tiny_config, tmp_path):
    names = ("train.log", "slurm-17.out", "job.err", ".DS_Store", "._config.json", "Thumbs.db", ".nfs0001")
    names += (".config.json.0123456789abcdef.part",)  # of a run that was killed while writing
    for name in names:
        (tmp_path / name).write_text("left")
    start(tmp_path, tiny_config)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names, "config.json", "history.jsonl"}
    assert all((tmp_path / name).read_text() == "left" for name in names)


def test_stale_temporary_files_are_removed(tiny_config, tmp_path):
    (tmp_path / ".config.json.0123456789abcdef.part").write_text('{"se')
    os.utime(tmp_path / ".config.json.0123456789abcdef.part", (0, 0))
    start(tmp_path, tiny_config)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "history.jsonl"}


def test_only_checking_writes_nothing(tiny_config, tmp_path):
    assert check_same(tmp_path / "run", resolved(tiny_config)) == {}
    assert not (tmp_path / "run").exists()


def test_a_second_run_is_kept_out_while_the_first_is_there(tiny_config, tmp_path):
    with open_run(tmp_path, resolved(tiny_config)):
        with pytest.raises(ConfigError, match=rf"is in use by process {os.getpid()} on "):
            start(tmp_path, tiny_config)
        assert len(history(tmp_path)) == 1
    start(tmp_path, tiny_config)


def test_relative_paths_are_found_from_another_directory(tiny_config, tmp_path, monkeypatch):
    home, model = tmp_path / "home", pathlib.Path(tiny_config.model.llm.path)
    (home / "models").mkdir(parents=True)
    (home / "models" / "llm").symlink_to(model)
    tiny_config.model.llm.path = "models/llm"
    monkeypatch.chdir(home)
    start(tmp_path / "run", tiny_config)
    monkeypatch.chdir(tmp_path)
    found = saved_config(tmp_path / "run")
    assert found.model.llm.path == str(home / "models" / "llm")
    assert (
        found.stages.finetune.sources.instructions.json
        == tiny_config.stages.finetune.sources.instructions.json
    )
    start(tmp_path / "run", found)  # and it is the same run
    tiny_config.model.llm.path = "home/models/llm"
    start(tmp_path / "run", tiny_config)
    assert history(tmp_path / "run")[-1]["directory"] == str(tmp_path)


def test_the_configuration_of_a_run_comes_back(tiny_config, tmp_path):
    start(tmp_path, tiny_config)
    assert resolved(saved_config(tmp_path)) == resolved(tiny_config)
    old = resolved(tiny_config)  # a run from before these keys existed
    del old["stages"]["finetune"]["lora"], old["data"]["overlong"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert resolved(saved_config(tmp_path)) == resolved(tiny_config)


def test_a_damaged_configuration_is_named(tiny_config, tmp_path):
    start(tmp_path, tiny_config)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text("\ufeff" + text, encoding="utf-8")  # as Windows editors save it
    start(tmp_path, tiny_config)
    (tmp_path / "config.json").write_text(text[:-20])
    for read in (saved_config, lambda path: start(path, tiny_config)):
        with pytest.raises(ConfigError, match=r"config.json is damaged \(.*line \d+"):
            read(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"overlong"', '"overlng"'))
    with pytest.raises(ConfigError, match=r"config.json: unknown config key 'data.overlng'; did you mean"):
        saved_config(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"stages"', '"stages": [], "stage"'))
    with pytest.raises(ConfigError, match=r"unknown config key 'stage'"):
        saved_config(tmp_path)
    for other in ("[]", '{"architectures": ["LlavaForConditionalGeneration"]}'):  # a published model's folder
        (tmp_path / "config.json").write_text(other)
        with pytest.raises(ConfigError, match=r"config.json is not that of a run; give the --workdir"):
            saved_config(tmp_path)
