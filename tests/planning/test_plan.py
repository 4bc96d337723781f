"""Planning without the machine: the formula against the compiler, traffic from HLO, the command, the search."""

import json
import pathlib

import jax
import pytest

from mllm_jax.cli.main import main
from mllm_jax.config import ConfigError
from mllm_jax.parallel import chips
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.planning import search
from mllm_jax.planning.collectives import collective_bytes
from mllm_jax.planning.compiled import QUICK, _temporaries, compile_step
from mllm_jax.planning.decoding import decoding
from mllm_jax.planning.describe import describe_stage
from mllm_jax.planning.estimate import (
    _Sizes,
    arguments,
    attention_backend,
    chip_bytes,
    memory,
    network_bytes,
    rows_of,
    useful_counts,
)
from mllm_jax.planning.topology import parse
from mllm_jax.training.stage import StagePlan
from mllm_jax.training.step import UNROLLED_DEPTH

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def llama(directory, depth=4, width=1024, positions=4096):
    """A directory with the `config.json` of a small Llama, without weights."""
    fields = {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": depth, "num_attention_heads": width // 128, "num_key_value_heads": width // 128,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)


@pytest.fixture
def config(tiny_config, tmp_path):
    """A recipe whose LLM is large beside everything else: 84 million parameters, never made."""
    tiny_config.model.llm.path = llama(tmp_path / "llm")
    tiny_config.model.dtype = tiny_config.model.frozen_dtype = "bfloat16"
    tiny_config.model.llm.remat = "full"
    stage = tiny_config.stages.finetune
    stage.seq_len, stage.batch_size, stage.accumulation, stage.image_slots = 1024, 16, 1, 1
    return tiny_config


# ------------------------------------------------------------------------------------------------- machines


@pytest.mark.parametrize(
    ("name", "chip", "count"),
    [
        ("v5p:4x4x4", "v5p", 64),
        ("v5p-128", "v5p", 64),
        ("v5e-64", "v5e", 64),
        ("v6e:2x4", "v6e", 8),
        ("h100:8", "h100", 8),
    ],
)
def test_machines_by_name(name, chip, count):
    machine = parse(name, slices=2)
    assert (machine.chip.name, machine.chips, machine.count) == (chip, count, 2 * count)


@pytest.mark.parametrize("name", ["v5p", "v5p-100", "v7x:2x2", "h100:2x2", "tpu"])
def test_unknown_machines_are_refused(name):
    with pytest.raises(ValueError, match=r"known|topology"):
        parse(name)


def test_chips_are_known_by_the_kind_of_their_devices():
    kinds = {
        "TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v4": "v4",
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100",
    }  # fmt: skip
    assert {kind: chips.chip_of(kind).name for kind in kinds} == kinds
    assert chips.peak_flops(jax.devices()) is None  # a CPU
    assert [chips.chip_of(kind) for kind in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "cpu")] == [None] * 3
    assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)


# ------------------------------------------------------------------------------------------------ collectives

HLO = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %c = s32[] constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i.1, %two)
  %x = f32[8]{0} get-tuple-element(%p.1), index=1
  %g = bf16[1000]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %y = bf16[50]{0} convert(%x)
  %s = (bf16[50]{0}, bf16[50]{0}, u32[]{:S(2)}) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %x)
}

%all-reduce-scatter (input: f32[400]) -> f32[100] {
  %input = f32[400]{0} parameter(0)
  %all = f32[400]{0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  %place = u32[] constant(100)
  ROOT %cut = f32[100]{0} dynamic-slice(%all, %place), dynamic_slice_sizes={100}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %one = s32[] constant(1)
  %init = (s32[], /*index=1*/f32[8]{0}) tuple(%one, %a)
  %w = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body
  %b = f32[100]{0} broadcast(%a), dimensions={}
  %r = (f32[100]{0}, /*index=1*/f32[8]{0}) all-reduce(%b, %a), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %k = f32[25]{0} reduce-scatter(%b), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
  %m = f32[400]{0} broadcast(%a), dimensions={}
  %n = f32[100]{0} fusion(%m), kind=kCustom, calls=%all-reduce-scatter
  %q = ((f32[400]{0}), f32[100]{0}, u32[]) async-start(%m), calls=%all-reduce-scatter
  %v = f32[100]{0} async-done(%q), calls=%all-reduce-scatter
  %h = bf16[800]{0} all-gather(%a), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}
  %e = ((f32[8]{0}), f32[64]{0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %f = f32[64]{0} all-gather-done(%e)
  ROOT %o = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def test_collectives_inside_a_loop_count_as_often_as_it_runs():
    """From 1 below 7 in steps of 2: three times. Several arrays of one collective all count.

    What is cut right after it is added up, in one fusion, is sent once and not twice.
    """
    assert collective_bytes(HLO, 8) == {
        "all-gather": 3 * 2000 * 3 / 4 + 256 * 7 / 8 + 1600 * 3 / 4,
        "all-reduce": 2 * 432 * 1 / 2,
        "collective-permute": 3 * 100,
        "reduce-scatter": 400 * 3 / 4 + 2 * 1600 * 3 / 4,
    }


def test_groups_of_an_unknown_form_are_no_guess():
    with pytest.raises(ValueError, match=r"unknown form: replica_groups=<2x4>"):
        collective_bytes(HLO.replace("replica_groups={{0,1},{2,3}}", "replica_groups=<2x4>"), 8)


def test_less_effort_is_a_setting_that_this_jax_has():
    name, effort = QUICK
    before = getattr(jax.config, name)
    jax.config.update(name, effort)
    jax.config.update(name, before)


def test_what_the_compiler_says_of_too_little_memory():
    other = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    one = "the total memory required for HLO temporaries (16.00G) exceeds available HBM (15.75G)."
    assert _temporaries(one, 5.0) == 16 * 2**30
    assert _temporaries(other, float(2**30)) == 19.5 * 2**30


# --------------------------------------------------------------------------------------- formula and compiler


def test_packed_rows_and_what_they_hold_without_data(config):
    stage = config.stages.finetune
    machine = parse("v5e-16")
    mesh = machine.abstract_mesh({"fsdp": -1})
    assert rows_of(StagePlan(config, "finetune", mesh)) == 16
    stage.samples_per_row, stage.image_slots, stage.batch_size = 8, 4, 100
    plan = StagePlan(config, "finetune", mesh)
    assert rows_of(plan) == 32  # 25 rows of four images, as 16 chips divide them
    counts = useful_counts(plan)
    assert counts["tokens"] == 100 * (4 + 220)
    assert counts["images"] == 100


@pytest.mark.slow
def test_the_search_finds_a_mesh_that_fits_and_prefers_the_simple(config):
    config.stages.finetune.batch_size = 256  # enough that the chips' peak is the bound
    changed, needed, bound = search.search(config, "finetune", parse("v5e-16"))
    assert (changed.mesh.sequence, changed.mesh.tensor) == (1, 1)
    assert changed.stages.finetune.accumulation == 1
    assert needed.total < 15.75 * 2**30
    assert 0 < bound.mfu <= 1
    config.stages.finetune.batch_size = 4  # 16 chips can share 4 rows by positions or heads alone
    changed, _, _ = search.search(config, "finetune", parse("v5e-16"))
    assert changed.mesh.sequence * changed.mesh.tensor >= 4


def test_the_search_knows_every_axis_and_what_rows_and_heads_allow(config):
    """8 heads; each mesh that training would take is there once, with any accumulation."""
    config.stages.finetune.batch_size = 16

    def meshes(machine):
        found = [
            tuple(sizes.values())
            for sizes, parts in search.candidates(config, "finetune", machine)
            if parts == 1
        ]
        assert len(set(found)) == len(found)
        return set(found)

    divisors = (1, 2, 4, 8, 16)
    machine = parse("v5e-16")
    every = {
        (16 // fsdp // sequence // tensor, fsdp, sequence, tensor)
        for fsdp in divisors
        for sequence in divisors
        for tensor in divisors
        if fsdp * sequence * tensor <= 16 and sequence * tensor <= 8
    }
    assert meshes(machine) == every
    config.stages.pretrain.seq_len = 1022  # the other stage takes the same mesh
    assert meshes(machine) == {sizes for sizes in every if sizes[2] <= 2}
    config.stages.pretrain.seq_len = 1024
    for data, fsdp, sequence, tensor in meshes(parse("v5e-4", slices=4)):
        assert sequence * tensor <= 4  # they stay inside a slice
        assert data * fsdp % 4 == 0


def test_a_row_that_is_long_is_shared_by_its_positions(config, tmp_path):
    """Two rows of many positions: no chip holds one, and heads alone do not divide what is kept of each block."""
    config.model.llm.path = llama(tmp_path / "long", positions=1 << 16)
    config.stages.finetune.batch_size = 2
    config.stages.finetune.seq_len = config.data.seq_len = 1 << 16
    changed, needed, _ = search.search(config, "finetune", parse("v5e-16"))
    assert changed.mesh.sequence > 1
    assert needed.total < 15.75 * 2**30


def test_chips_that_share_rows_divide_their_images(config):
    """Trained encoder, whose activations are kept: each of 8 chips encodes an eighth of the images of their rows."""
    config.stages.finetune.trainable = ("vision/.*", "connector/.*", "llm/.*")
    config.stages.finetune.image_slots = 64
    machine, found = parse("v5e-8"), {}
    for axis in ("data", "sequence", "tensor"):
        plan = StagePlan(config, "finetune", machine.abstract_mesh({axis: 8}))
        found[axis] = _Sizes(plan).images
    # 2 rows on each, or 16 on all: as many images on a chip, of which the tokens of the rows' embeddings come back
    assert found["sequence"] == found["tensor"]
    tokens = 64 * 4 * 14 * 2 * 1024 * 4
    assert found["tensor"] - found["data"] == pytest.approx(tokens)


@pytest.mark.slow
def test_a_stage_that_does_not_fit_says_what_would_help(config):
    config.stages.finetune.batch_size = 8192
    found = describe_stage(config, "finetune", parse("v5e-16"), estimate_only=True)
    assert not found["fits"]
    helpful = [change["keys"] for change in found["changes"] if change["fits"]]
    assert any("accumulation" in keys for keys in helpful)


def test_gpus_are_estimated(config):
    found = describe_stage(config, "finetune", parse("h100:8"))
    assert found["fits"]
    assert not found["compiled"]
    assert found["attention"] == "cudnn"


def test_devices_that_share_rows_hold_parts_of_their_positions(config):
    """Parameters are shared as over `fsdp`; activations of a step shrink, and queries, keys and values are sent."""
    machine, found = parse("h100:8"), {}
    for sequence in (1, 4):
        config.mesh.update({"data": 1, "fsdp": 8 // sequence, "sequence": sequence})
        found[sequence] = describe_stage(config, "finetune", machine)
    whole, shared = (found[sequence]["memory"] for sequence in (1, 4))
    assert (shared["parameters"], shared["optimizer"]) == (whole["parameters"], whole["optimizer"])
    assert shared["temporaries"] == pytest.approx(
        whole["temporaries"], rel=0.02
    )  # as many positions on a chip
    heads, positions, passes, blocks = 4 * 8 * 128 * 2, 2 * 1024, 3, 4
    traded = found[4]["network_bytes"] - found[1]["network_bytes"]
    assert traded == pytest.approx(blocks * passes * positions * heads * 3 / 4)
    prompts = decoding(config, machine, batch=8, context=1024)
    assert prompts.cache == 2 * 2 * 4 * 8 * 128 * 1024  # each chip answers one of them


def test_hosts_that_share_parameters_send_them_over_the_slow_network(config):
    """A chip sends its part to the same chip of the other host, then all inside; over `data`, gradients alone."""
    machine, found = parse("h100:8", slices=2), {}
    for data in (1, 2):
        config.mesh.update({"data": data, "fsdp": 16 // data})
        found[data] = describe_stage(config, "finetune", machine)
    shared, apart = found[1], found[2]
    assert shared["slow_network_bytes"] == pytest.approx(shared["network_bytes"] / (7 / 8) / 16)
    assert apart["network_bytes"] == pytest.approx(shared["network_bytes"])
    parameters = apart["memory"]["parameters"]  # float32, of which most gradients have half the bytes
    assert 0.5 * parameters < apart["slow_network_bytes"] < 0.7 * parameters


def test_a_mesh_that_training_would_refuse_is_not_planned(config):
    machine = parse("h100:8")
    config.mesh.update({"data": 8, "fsdp": 1})
    config.stages.finetune.batch_size = 12
    with pytest.raises(ConfigError, match=r"finetune\.batch_size"):
        describe_stage(config, "finetune", machine)
    config.stages.finetune.batch_size = 16
    config.mesh.update({"data": 2, "sequence": 4})
    config.stages.finetune.seq_len = 1022
    with pytest.raises(ConfigError, match=r"seq_len.*1024"):
        describe_stage(config, "finetune", machine)


@pytest.mark.slow
def test_a_mesh_that_would_help_is_named_in_full(config):
    config.mesh.update({"data": 1, "fsdp": 2, "sequence": 4})
    config.stages.finetune.batch_size = 8192
    found = describe_stage(config, "finetune", parse("h100:8"))
    (keys,) = [change["keys"] for change in found["changes"] if "mesh.data" in change["keys"]]
    assert "--config.mesh.sequence=1" in keys


def test_decoding_is_bound_by_memory_at_one_prompt(config):
    found = decoding(config, parse("v5e:1x1"), batch=1, context=1024)
    assert found.bound == "memory"
    assert found.cache == 2 * 2 * 4 * 8 * 128 * 1024  # keys and values, bfloat16
    assert (
        decoding(config, parse("v5e:1x1"), batch=64, context=1024).tokens_per_second > found.tokens_per_second
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({}, {"data": 1, "fsdp": 4}),
        ({"model.llm.remat": "none"}, {"data": 1, "fsdp": 2, "tensor": 2}),
        ({"stages.finetune.accumulation": 2}, {"data": 4}),
    ],
    ids=["fsdp", "tensor", "data"],
)
def test_the_formula_is_near_the_compilers_memory(config, changes, mesh):
    pytest.importorskip("libtpu", reason="compiles for a TPU topology")
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    machine = parse("v5p:2x2x1")
    plan = StagePlan(config, "finetune", machine.mesh(mesh))
    compiled = compile_step(plan, quick=True)
    assert compiled.fits
    assert sum(arguments(plan).values()) == pytest.approx(
        compiled.argument_bytes, rel=0.02
    )  # tiny ones are padded
    guessed = memory(plan, attention_backend(plan, machine))
    assert guessed.total == pytest.approx(compiled.memory.total, rel=0.35)
    weights = chip_bytes(plan.state.params) / 2  # in bfloat16
    # Over fsdp each chip gathers the other three parts at least once; over data gradients are added up.
    sent = sum(compiled.collectives.values())
    assert sent > weights * (3 if mesh.get("fsdp") == 4 else 1)
    assert network_bytes(plan, machine)[0] == pytest.approx(sent, rel=0.25)


def test_the_program_does_not_grow_with_depth(config, tmp_path):
    """What is compiled is about as long for many blocks as for few, and so are time and memory of compiling.

    Fewer still are written out on CPUs.
    """
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    lines = set()
    for depth in (UNROLLED_DEPTH + 1, 10 * UNROLLED_DEPTH):
        config.model.llm.path = llama(tmp_path / f"{depth}", depth, 256)
        lines.add(StagePlan(config, "finetune", mesh).lower().as_text().count("\n"))
    assert max(lines) < 1.1 * min(lines)


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_plans_a_published_recipe_offline(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = f"--config={CONFIGS / 'llava15.py'}"
    code = run_command(
        "plan", recipe, "--topology=v5p-128", "--stage=finetune", "--estimate", "--json", "--mesh=auto"
    )
    found = json.loads(capsys.readouterr().out)["stages"][0]
    assert code == 0
    assert found["parameters"]["llm"] == 6_738_415_616
    assert found["mesh"]["data"] * found["mesh"]["fsdp"] * found["mesh"]["tensor"] == 64
    # 6 operations per parameter and token, and what attention, encoder and head add or spare
    assert found["model_flops"] == pytest.approx(6 * 6.74e9 * 128 * 2048, rel=0.1)


def run_command(*arguments):
    """The exit code of a command in a process of its own (flags can be defined once)."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "mllm_jax.cli.main", *arguments], capture_output=True, text=True
    )
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def test_the_command_names_what_is_wrong(capsys):
    assert main(["plan"]) == 0
    assert "--topology=NAME" in capsys.readouterr().out
    recipe = f"--config={CONFIGS / 'quickstart.py'}"
    assert run_command("plan", recipe, "--topology=v9:2x2", "--estimate") == 2
    assert "v9:2x2" in capsys.readouterr().err
    assert run_command("plan", recipe, "--topology=v5e:2x2", "--stage=third", "--estimate") == 2
    assert "pretrain, finetune" in capsys.readouterr().err
