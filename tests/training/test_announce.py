"""What a run says before it starts: sizes that surprise, and how many steps the data give."""

import re

import pytest

from mllm_jax.data import packing
from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.inference import runs
from mllm_jax.models import mllm, paths
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.training.announce import FEW_STEPS, attention_lines, length_lines, model_lines
from mllm_jax.training.sources import prepare_sources


@pytest.fixture
def mesh():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


def test_a_connector_larger_than_the_llm_is_said_with_both_sizes(tiny_config, mesh):
    assert len(list(model_lines(tiny_config, runs.model_config(tiny_config), mesh))) == 1
    tiny_config.model.connector.name = "q_former"
    tiny_config.data.seq_len = 200
    model = runs.model_config(tiny_config)
    params = mllm.abstract_params(model)
    connector, llm = paths.count(params["connector"]), paths.count(params["llm"])
    assert connector > llm
    line = list(model_lines(tiny_config, model, mesh))[1]
    assert f"{connector:,}" in line
    assert f"{llm:,}" in line


def test_the_attention_of_each_part_is_said(tiny_config):
    def line():
        (only,) = attention_lines(tiny_config, runs.model_config(tiny_config))
        return only

    assert line() == (
        "attention: LLM xla (auto: rows of 80 are short), vision tower xla (auto: rows of 17 are short)"
    )
    tiny_config.stages.finetune.seq_len = 256  # one stage has longer rows
    short, long = attention_lines(tiny_config, runs.model_config(tiny_config))
    assert short.startswith("attention in rows of 80: LLM xla (auto: rows of 80 are short), ")
    assert long.startswith("attention in rows of 256: LLM blockwise (auto on cpu), ")
    tiny_config.stages.finetune.seq_len = None
    tiny_config.data.seq_len = 512
    assert "LLM blockwise (auto on cpu)" in line()
    tiny_config.model.attention = "xla"
    assert line() == "attention: LLM xla (as configured), vision tower xla (as configured)"


def test_few_steps_are_said_for_every_stage_with_the_keys_that_change_it(
    tiny_config, tiny_tokenizer, tmp_path
):
    """8 captions in batches of 4 are 2 steps an epoch; a number of steps that was asked for needs no advice."""
    tiny_config.stages.pretrain.steps = None
    tiny_config.stages.finetune.steps = 6
    model = runs.model_config(tiny_config)
    sources = {
        name: prepare_sources(tiny_config, name, model, tiny_tokenizer, tmp_path)
        for name in ("pretrain", "finetune")
    }

    def told():
        return list(length_lines(tiny_config, sources, dict.fromkeys(sources)))

    counted, asked, advice = told()
    assert counted.startswith("stage pretrain: 2 steps (8 samples x 1 epoch")
    assert asked.startswith("stage finetune: 6 steps")
    epochs = int(re.search(r"stages\.pretrain\.epochs=(\d+)", advice)[1])
    assert "stages.*.steps" in advice
    assert "finetune" not in advice

    tiny_config.stages.pretrain.epochs = epochs  # following the advice ends it
    counted, asked = told()
    assert counted.startswith(f"stage pretrain: {FEW_STEPS} steps")


def test_a_packed_stage_is_planned_once(train, tiny_config, tmp_path, monkeypatch, capsys):
    """What is said of its length and what is trained are one plan."""
    planned = []
    lay_out = packing.lay_out
    monkeypatch.setattr(packing, "lay_out", lambda *of: (planned.append(1), lay_out(*of))[1])
    del tiny_config.stages.finetune
    tiny_config.stage_order = ("pretrain",)
    stage = tiny_config.stages.pretrain
    stage.steps, stage.epochs, stage.samples_per_row = None, 2, 2
    train.train(tiny_config, tmp_path / "run", evaluate=False)
    assert len(planned) == 1
    said = re.search(r"stage pretrain: (\d+) steps .* packed in 2 rows a step", capsys.readouterr().out)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")["pretrain"][-1]["step"] == int(said[1])
