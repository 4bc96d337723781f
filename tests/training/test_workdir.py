"""A work directory belongs to one configuration."""

import json
import os
import re

import pytest

from mllm_jax.config import ConfigError, resolved
from mllm_jax.workdir import claim, saved_config


def test_the_same_configuration_may_come_back(tiny_config, tmp_path):
    run = tmp_path / "deep" / "run"
    claim(run, resolved(tiny_config))
    assert json.loads((run / "config.json").read_text()) == resolved(tiny_config)
    (run / "metrics.jsonl").write_text("{}\n")
    claim(run, resolved(tiny_config))
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.jsonl"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: c.update({"seed": 8}), "seed = 7, not 8"),
        (lambda c: c.model.connector.update({"name": "linear"}), "model.connector.average_pool"),
        (
            lambda c: c.stages.finetune.update({"trainable": ("llm/.*",)}),
            "stages.finetune.trainable = ['connector/.*'",
        ),
        (lambda c: c.stages.pretrain.update({"steps": 7}), "stages.pretrain.steps = 6, not 7"),
    ],
)
def test_another_configuration_is_refused_and_the_key_named(tiny_config, tmp_path, change, key):
    claim(tmp_path, resolved(tiny_config))
    before = (tmp_path / "config.json").read_bytes()
    change(tiny_config)
    with pytest.raises(ConfigError, match=re.escape(f"holds a run with {key}")):
        claim(tmp_path, resolved(tiny_config))
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_does_not_alter_training_may_change(tiny_config, tmp_path):
    claim(tmp_path, resolved(tiny_config))
    tiny_config.mesh.fsdp = 2
    tiny_config.data.threads = 3
    tiny_config.stages.pretrain.sources.captions.duplicate_ids = "number"
    tiny_config.data.overlong = "skip"  # go on past a sample that has stopped the run
    tiny_config.eval.max_new_tokens = 5
    tiny_config.stages.pretrain.checkpoint_every = 3
    claim(tmp_path, resolved(tiny_config))
    assert json.loads((tmp_path / "config.json").read_text()) == resolved(tiny_config)


def test_a_run_from_before_a_key_existed_is_one_with_its_default(tiny_config, tmp_path):
    old = resolved(tiny_config)
    for stage in old["stages"].values():
        del stage["lora"], stage["quantize_base"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    claim(tmp_path, resolved(tiny_config))
    (tmp_path / "config.json").write_text(json.dumps(old))
    tiny_config.stages.finetune.lora.rank = 4
    with pytest.raises(ConfigError, match=re.escape("holds a run with stages.finetune.lora.rank = 0, not 4")):
        claim(tmp_path, resolved(tiny_config))


def test_a_directory_of_something_else_is_refused(tiny_config, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        claim(tmp_path, resolved(tiny_config))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_run_killed_while_claiming_can_be_started_again(tiny_config, tmp_path):
    (tmp_path / ".config.json.0123456789abcdef.part").write_text('{"se')
    os.utime(tmp_path / ".config.json.0123456789abcdef.part", (0, 0))
    claim(tmp_path, resolved(tiny_config))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_only_checking_writes_nothing(tiny_config, tmp_path):
    claim(tmp_path / "run", resolved(tiny_config), write=False)
    assert not (tmp_path / "run").exists()
    claim(tmp_path / "run", resolved(tiny_config))
    tiny_config.seed = 8
    with pytest.raises(ConfigError, match="seed = 7"):
        claim(tmp_path / "run", resolved(tiny_config), write=False)


def test_the_configuration_of_a_run_comes_back(tiny_config, tmp_path):
    claim(tmp_path, resolved(tiny_config))
    assert resolved(saved_config(tmp_path)) == resolved(tiny_config)
    old = resolved(tiny_config)  # a run from before these keys existed
    del old["stages"]["finetune"]["lora"], old["data"]["overlong"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert resolved(saved_config(tmp_path)) == resolved(tiny_config)


def test_a_damaged_configuration_is_named(tiny_config, tmp_path):
    claim(tmp_path, resolved(tiny_config))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[:-20])
    for read in (saved_config, lambda path: claim(path, resolved(tiny_config))):
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
