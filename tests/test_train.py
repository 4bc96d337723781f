"""train.py as its users meet it: two stages, kills and resumes, refusals, and errors that say what to do."""

import contextlib
import gc
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import jax
import numpy as np
import pytest
import tiny
from absl import flags

from mllm_jax.cli import script
from mllm_jax.config import ConfigError
from mllm_jax.data.tfds_llava import LlavaSource
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.evaluation.report import losses
from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.inference import runs
from mllm_jax.interop.saved_params import CheckpointError, load_params
from mllm_jax.lock import LockLostError
from mllm_jax.models import paths
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.training.checkpoint import StageCheckpoints
from mllm_jax.training.metrics import NonFiniteLoss, RunLog
from mllm_jax.training.params import load_stage
from mllm_jax.training.sources import prepare_sources, stage_iterator
from mllm_jax.training.step import loss_and_grads, to_device

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 6


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory, tiny_checkpoints, tiny_data):
    """(config, work directory, parameters) of a finished run of both stages."""
    config = tiny.recipe(tiny_checkpoints, tiny_data)
    directory = tmp_path_factory.mktemp("runs") / "finished"
    return config, directory, train.train(config, directory, evaluate=False)


def assert_same_bits(found, expected):
    found, expected = paths.flatten(found), paths.flatten(expected)
    assert set(found) == set(expected)
    for path, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), err_msg=path)


def files_of(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_configuration_curves_checkpoints_and_parameters(finished):
    _, directory, _ = finished
    names = {path.name for path in directory.iterdir()}
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "params", "data"} <= names
    metrics = read_metrics(directory / "metrics.jsonl")
    for stage in ("pretrain", "finetune"):
        assert [record["step"] for record in metrics[stage]] == list(range(1, STEPS + 1))
        assert metrics[stage][-1]["loss"] < metrics[stage][0]["loss"]
        assert {"learning_rate", "tokens_per_second", "padding_share", "grad_norm/connector"} <= set(
            metrics[stage][0]
        )
        assert any((directory / "tensorboard" / stage).glob("events*"))
        steps = {int(path.name) for path in (directory / "checkpoints" / stage).iterdir()}
        assert {STEPS - 2, STEPS} <= steps
    assert "grad_norm/llm" in metrics["finetune"][0]
    assert "grad_norm/llm" not in metrics["pretrain"][0]


def test_each_stage_trains_what_it_names_and_nothing_else(finished, tiny_params):
    config, directory, params = finished
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    pretrained = load_stage(directory / "params" / "pretrain", config, runs.model_config(config), mesh)
    assert_same_bits(params["vision"], tiny_params["vision"])
    assert_same_bits(pretrained["llm"], tiny_params["llm"])
    unused = np.setdiff1d(
        np.arange(260), [0]
    )  # rows of the embedding may be unused; something must have moved
    assert len(unused)
    for path, leaf in paths.flatten(params["llm"]).items():
        assert (np.asarray(leaf) != paths.flatten(tiny_params["llm"])[path]).any(), path
    for path, leaf in paths.flatten(params["connector"]).items():
        assert (np.asarray(leaf) != np.asarray(paths.flatten(pretrained["connector"])[path])).any(), path


def test_stage_two_starts_from_stage_one(finished, tiny_tokenizer):
    """The loss that stage 2 reports first is that of stage 1's parameters on stage 2's first batch."""
    config, directory, _ = finished
    model = runs.model_config(config)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    stage = config.stages.finetune
    params = load_stage(directory / "params" / "pretrain", config, model, mesh)
    prepared = prepare_sources(config, "finetune", model, tiny_tokenizer, directory)
    with stage_iterator(config, stage, model, tiny_tokenizer, prepared) as batches:
        batch = to_device(next(batches).arrays, mesh)
    run = jax.jit(lambda p, b: loss_and_grads(model, p, {}, b, config.data.seq_len, 1, jax.random.key(0))[0])
    first = read_metrics(directory / "metrics.jsonl")["finetune"][0]
    assert first["loss"] == pytest.approx(float(run(params, batch)), rel=1e-5)


def test_the_same_command_again_does_nothing(train, finished, monkeypatch):
    config, directory, params = finished
    before = files_of(directory)
    monkeypatch.setattr(train, "train_stage", lambda *_: pytest.fail("trained again"))
    assert_same_bits(train.train(config, directory, evaluate=False), params)
    assert files_of(directory) == before


def test_another_configuration_is_refused_before_anything_is_touched(train, finished):
    config, directory, _ = finished
    before = files_of(directory)
    config = config.copy_and_resolve_references()
    config.stages.finetune.learning_rate = 1e-3
    with pytest.raises(
        ConfigError, match=r"holds a run with stages\.finetune\.learning_rate = 0\.01, not 0\.001"
    ):
        train.train(config, directory, evaluate=False)
    assert files_of(directory) == before


# ---------------------------------------------------------------------------------------------- stops and bad input


def test_a_log_that_cannot_be_closed_loses_no_checkpoint(train, tiny_config, tmp_path, monkeypatch):
    close, close_log, closed = StageCheckpoints.close, RunLog.close, []

    def fails(log):
        close_log(log)
        raise OSError("the bucket does not answer")

    monkeypatch.setattr(RunLog, "close", fails)
    monkeypatch.setattr(StageCheckpoints, "close", lambda self: closed.append(close(self)))
    with pytest.raises(OSError, match="does not answer"):
        train.train(tiny_config, tmp_path / "run", evaluate=False)
    assert closed == [None]
    assert (tmp_path / "run" / "checkpoints" / "pretrain" / str(STEPS)).is_dir()


def test_a_loss_that_is_not_finite_stops_the_run_and_no_checkpoint_holds_it(train, tiny_config, tmp_path):
    tiny_config.stages.pretrain.learning_rate = 1e30
    tiny_config.stages.pretrain.checkpoint_every = 1
    tiny_config.stages.pretrain.keep_last = STEPS
    with pytest.raises(
        NonFiniteLoss, match=r"'pretrain': loss .* at step 3; its samples: caption\d, "
    ) as error:
        train.train(tiny_config, tmp_path / "run", evaluate=False)
    assert len(re.findall(r"caption\d", str(error.value))) == 4
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0  # where the trouble can be seen
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")["pretrain"]
    assert [record["step"] for record in metrics] == [1, 2]
    assert all(np.isfinite(record["loss"]) for record in metrics)
    checkpoints = StageCheckpoints(tmp_path / "run" / "checkpoints" / "pretrain", STEPS, 1)
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()
    import orbax.checkpoint as ocp

    for step in (1, 2):
        with ocp.StandardCheckpointer() as reader:
            state = reader.restore(tmp_path / "run" / "checkpoints" / "pretrain" / str(step) / "state")
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not (tmp_path / "run" / "params").exists()


def test_a_picture_that_cannot_be_drawn_does_not_hide_why_a_run_stopped(
    train, tiny_config, tmp_path, monkeypatch
):
    def stop(plan, batches, begun, directory, *_):
        (directory / "metrics.jsonl").write_text("{}\n")
        raise CheckpointError("a checkpoint could not be written")

    def full(log, out):
        drawn.append(out)
        raise OSError(28, "No space left on device")

    drawn = []
    monkeypatch.setattr(train, "train_stage", stop)
    monkeypatch.setattr(losses, "plot_losses", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        train.train(tiny_config, tmp_path / "run", evaluate=False)
    assert drawn == [tmp_path / "run" / "loss.png"]


def test_a_finished_run_whose_curves_cannot_be_drawn_is_finished(
    train, tiny_config, tmp_path, monkeypatch, capsys
):
    def full(log, out):
        raise OSError(28, "No space left on device")

    del tiny_config.stages.finetune
    tiny_config.stage_order = ("pretrain",)
    monkeypatch.setattr(losses, "plot_losses", full)
    train.train(tiny_config, tmp_path / "run", evaluate=False)
    said = capsys.readouterr().out
    assert "loss.png could not be drawn (OSError: [Errno 28] No space left on device)" in said
    assert "finished in" in said


def test_a_run_whose_directory_was_taken_over_writes_nothing_more(train, tiny_config, tmp_path, monkeypatch):
    """As after a suspension, on a disk that hosts share."""
    add, holder = RunLog.add, json.dumps({"host": "elsewhere", "process": 17})

    def taken(log, step, *arguments):
        add(log, step, *arguments)
        if step == 3:
            (tmp_path / "run" / "lock").write_text(holder)

    monkeypatch.setattr(RunLog, "add", taken)
    with pytest.raises(LockLostError, match="was taken over by process 17 on elsewhere"):
        train.train(tiny_config, tmp_path / "run", evaluate=False)
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")["pretrain"]] == [1, 2]
    assert max(int(path.name) for path in (tmp_path / "run" / "checkpoints" / "pretrain").iterdir()) == 2
    assert (tmp_path / "run" / "lock").read_text() == holder
    assert not (tmp_path / "run" / "loss.png").exists()


def test_waits_for_compilation_and_checkpoints_are_not_the_speed_of_training(
    train, tiny_config, tmp_path, monkeypatch
):
    """The first step compiles, and every checkpoint takes half a second here."""
    save = StageCheckpoints.save

    def slow(*arguments):
        time.sleep(0.5)
        save(*arguments)

    del tiny_config.stages.finetune
    tiny_config.stage_order = ("pretrain",)
    monkeypatch.setattr(StageCheckpoints, "save", slow)
    train.train(tiny_config, tmp_path / "run", evaluate=False)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")["pretrain"]
    assert max(record["step_seconds"] for record in metrics) < 0.4


@pytest.mark.slow
def test_a_stage_keeps_nothing_on_the_devices_that_it_does_not_use(train, tiny_config, tmp_path, monkeypatch):
    """Parameters that an earlier stage has trained are copied into the state and must not stay beside it."""
    config, earlier, alive = tiny_config, [], []
    config.stages.pretrain.trainable = ("connector/.*", "llm/.*")
    add, start = RunLog.add, train.starting_params

    def starting(config, model, name, before):
        if before is not None:
            earlier.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(before["llm"]))
        return start(config, model, name, before)

    def watched(log, *arguments):
        add(log, *arguments)
        gc.collect()
        alive.append(sum(leaf() is not None for leaf in earlier))

    monkeypatch.setattr(train, "starting_params", starting)
    monkeypatch.setattr(RunLog, "add", watched)
    train.train(config, tmp_path / "run", evaluate=False)
    assert len(earlier) > 5
    assert max(alive) == 0


def test_a_packed_stage_trains_on_all_samples_with_the_rows_that_they_need(
    train, tiny_config, tiny_tokenizer, tmp_path, capsys
):
    stage = tiny_config.stages.finetune
    del tiny_config.stages.pretrain
    tiny_config.stage_order = ("finetune",)
    stage.steps, stage.epochs, stage.batch_size = None, 2, 6
    model = runs.model_config(tiny_config)
    prepared = prepare_sources(tiny_config, "finetune", model, tiny_tokenizer, tmp_path / "unpacked")
    with stage_iterator(tiny_config, stage, model, tiny_tokenizer, prepared) as batches:
        expected = sum(np.count_nonzero(batch.arrays.loss_weights) for batch in batches)
    stage.samples_per_row, stage.seq_len, stage.image_slots = 4, 240, 6
    train.train(tiny_config, tmp_path / "run", evaluate=False)
    assert "packed in 2 rows a step" in capsys.readouterr().out
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")["finetune"]
    assert sum(record["label_tokens"] for record in records) == expected > 0


def test_overlong_samples_stop_the_run_or_are_skipped_and_counted(train, tiny_config, tmp_path, capsys):
    samples = {f"short{i}": (1, [("", "fine")]) for i in range(3)}
    samples["endless"] = (1, [("", "on and on " * 20)])
    json_path, images = tiny.write_llava(tmp_path / "data", samples)
    source = tiny_config.stages.pretrain.sources.captions
    source.json, source.images = str(json_path), str(images)
    stage = tiny_config.stages.pretrain
    stage.steps, stage.epochs = None, 2
    del tiny_config.stages.finetune
    tiny_config.stage_order = ("pretrain",)
    with pytest.raises(SampleTooLong, match=r"sample 'endless': has \d+ tokens"):
        train.train(tiny_config, tmp_path / "strict", evaluate=False)
    tiny_config.data.overlong = "skip"
    train.train(tiny_config, tmp_path / "lenient", evaluate=False)
    assert capsys.readouterr().out.count("skipped sample 'endless'") == 2
    assert read_metrics(tmp_path / "lenient" / "metrics.jsonl")["pretrain"][-1]["skipped"] == 2


def test_data_of_the_second_stage_is_checked_before_the_first_is_trained(train, tiny_config, tmp_path):
    json_path, images = tiny.write_llava(tmp_path / "data", {"mute": (1, [("what?", "")])})
    source = tiny_config.stages.finetune.sources.instructions
    source.json, source.images = str(json_path), str(images)
    with pytest.raises(ValueError, match="'mute'"):
        train.train(tiny_config, tmp_path / "run", evaluate=False)
    samples = {"endless": (1, [("what?", "on and on " * 20)])}
    source.json, source.images = map(str, tiny.write_llava(tmp_path / "more", samples))
    with pytest.raises(SampleTooLong, match="'endless'"):
        train.train(tiny_config, tmp_path / "longer", evaluate=False)
    assert not (tmp_path / "longer" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def copy_data(config, folder):
    """Copies the data of all stages, with times of their own, and lets the recipe read the copies."""
    for stage in config.stages.values():
        for name, source in stage.sources.items():
            (folder / name).mkdir(parents=True)
            shutil.copyfile(source.json, folder / name / "data.json")
            shutil.copytree(source.images, folder / name / "images", copy_function=shutil.copyfile)
            source.json, source.images = str(folder / name / "data.json"), str(folder / name / "images")


@pytest.fixture(scope="module")
def stopped(train, finished, tmp_path_factory):
    """(config, work directory, data) of the finished run's twin that a signal stops after step 3 of stage 2."""
    root = tmp_path_factory.mktemp("stopped")
    config = finished[0].copy_and_resolve_references()
    copy_data(config, root / "data")
    add = RunLog.add

    def asked_to_stop(log, step, *arguments):
        add(log, step, *arguments)
        if (log.stage, step) == ("finetune", 3):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "add", asked_to_stop)
        with pytest.raises(SystemExit, match="stopped by a signal after step 3; the same command continues"):
            train.train(config, root / "run", evaluate=False)
    assert signal.getsignal(signal.SIGTERM) is before
    return config, root / "run", root / "data"


@pytest.mark.parametrize(
    "data",
    [
        "untouched",
        "gone",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("copied again", "elsewhere")),
    ],
)
def test_a_stopped_run_goes_on_with_the_same_data_wherever_it_is(
    data, train, finished, stopped, tmp_path, capsys
):
    config, run, folder = stopped
    config = config.copy_and_resolve_references()
    shutil.copytree(run, tmp_path / "run")
    before = folder.rename(tmp_path / "before")
    try:
        if data == "untouched":
            shutil.copytree(before, folder)  # times and all
        elif data == "copied again":
            shutil.copytree(before, folder, copy_function=shutil.copyfile)
            for path in folder.rglob("*"):
                os.utime(path, (1, 1))
        elif data == "elsewhere":
            shutil.copytree(before, folder)
            copy_data(config, tmp_path / "moved")
            shutil.rmtree(folder)
        capsys.readouterr()
        assert_same_bits(train.train(config, tmp_path / "run", evaluate=False), finished[2])
        assert ("going on with the prepared copy" in capsys.readouterr().out) == (data == "gone")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        before.rename(folder)


def test_broken_samples_stop_the_run_or_are_left_out_and_listed(train, tiny_config, tmp_path, capsys):
    source = tiny_config.stages.pretrain.sources.captions
    entries = json.loads(pathlib.Path(source.json).read_text())
    images = pathlib.Path(shutil.copytree(source.images, tmp_path / "images"))
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    (images / "cut.png").write_bytes(next(images.glob("*.png")).read_bytes()[:-40])
    broken = [{"id": name, "image": f"{name}.png", "conversations": turns} for name in ("cut", "missing")]
    half = [{"id": "half", "conversations": [turns[0], {"from": "gpt", "value": "\ud83d"}]}]
    source.json, source.images = str(tmp_path / "data.json"), str(images)
    (tmp_path / "data.json").write_text(json.dumps([*broken, *entries, *half]))
    tiny_config.stage_order = ("pretrain",)
    del tiny_config.stages.finetune
    with pytest.raises(ValueError, match="sample 'missing'"):
        train.train(tiny_config, tmp_path / "run", evaluate=False)
    tiny_config.data.broken = "skip"  # the same directory goes on with it
    train.train(tiny_config, tmp_path / "run", evaluate=False)
    said = " ".join(capsys.readouterr().out.split())
    assert f"source captions: 3 broken samples left out of {len(entries) + 3}" in said
    (listed,) = (tmp_path / "run" / "data").rglob("skipped.jsonl")
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["sample"] for row in rows] == ["cut", "missing", "half"]
    trained = LlavaSource(listed.parent)
    assert [trained[i].id for i in range(len(trained))] == [entry["id"] for entry in entries]


# ------------------------------------------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, tiny_checkpoints, tiny_data):
    """The tiny recipe as a file, with stages long enough to be killed in."""
    checkpoints = {name: str(path) for name, path in tiny_checkpoints.items()}
    data = {name: [str(path) for path in pair] for name, pair in tiny_data.items()}
    path = tmp_path_factory.mktemp("recipe") / "recipe.py"
    path.write_text(
        f"""import sys

sys.path.insert(0, {str(ROOT / "tests")!r})
import tiny


def get_config():
    config = tiny.recipe({checkpoints!r}, {data!r})
    for stage in config.stages.values():
        stage.steps = 16
        stage.checkpoint_every = 3
        stage.eps = 1e-3  # or Adam would make whole steps of rounding errors where a gradient is nearly zero
    return config
"""
    )
    return path


def start_training(recipe_file, directory, environment, *arguments, before=("train.py",), **variables):
    run = [f"--config={recipe_file}", f"--workdir={directory}", "--noevaluate", *arguments]
    return subprocess.Popen(
        [sys.executable, *before, *run],
        cwd=ROOT,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Waits for a run that is to succeed and returns what it said."""
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def unbroken(recipe_file, tmp_path_factory, script_environment):
    """Work directory of a run in one process on one device, from beginning to end."""
    directory = tmp_path_factory.mktemp("runs") / "unbroken"
    finish(start_training(recipe_file, directory, script_environment))
    return directory


def records(directory, stage):
    with contextlib.suppress(FileNotFoundError, ValueError):
        return len(read_metrics(directory / "metrics.jsonl").get(stage, ()))
    return 0


def kill_in_stage(process, directory, stage, after):
    """kill -9 once `after` steps of a stage are logged, and a moment later.

    The second checkpoint (step 6) waits for the first, so a run that has logged step 7 has one to go on from.
    """
    deadline = time.time() + 300
    while records(directory, stage) < after and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    process.kill()
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output
    assert 0 < records(directory, stage) < 16, output


@pytest.mark.slow
def test_killed_in_each_stage_and_resumed_equals_an_unbroken_run_bit_for_bit(
    recipe_file, unbroken, tmp_path, script_environment
):
    broken = tmp_path / "broken"
    for stage in ("pretrain", "finetune"):
        process = start_training(recipe_file, broken, script_environment)
        kill_in_stage(process, broken, stage, after=random.randint(7, 12))
    output = finish(start_training(recipe_file, broken, script_environment))
    assert "stage pretrain: done before" in output
    assert re.search(r"stage finetune: continuing after step \d+", output)

    for stage in ("pretrain", "finetune"):
        first, second = (load_whole(run / "params" / stage) for run in (unbroken, broken))
        assert_same_bits(first, second)
    assert curve(broken) == curve(unbroken)
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)
    leftovers = [path.name for path in broken.rglob("*orbax-checkpoint-tmp*")]
    assert not leftovers


@pytest.mark.slow
def test_a_run_killed_on_four_devices_goes_on_on_one(recipe_file, unbroken, tmp_path, script_environment):
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    process = start_training(recipe_file, tmp_path / "run", script_environment, *mesh, **tiny.fake_devices(4))
    kill_in_stage(process, tmp_path / "run", "finetune", after=random.randint(7, 12))
    output = finish(start_training(recipe_file, tmp_path / "run", script_environment))
    assert re.search(r"stage finetune: continuing after step \d+", output)
    np.testing.assert_allclose(curve(tmp_path / "run"), curve(unbroken), rtol=2e-3)


ROWS_FOR_EIGHT = [
    f"--config.stages.{stage}.batch_size={rows}" for stage, rows in (("pretrain", 8), ("finetune", 16))
]
ROWS_FOR_EIGHT += [f"--config.stages.{stage}.steps=4" for stage in ("pretrain", "finetune")]


@pytest.fixture(scope="module")
def on_one_device(recipe_file, tmp_path_factory, script_environment):
    directory = tmp_path_factory.mktemp("one_device") / "run"
    finish(start_training(recipe_file, directory, script_environment, *ROWS_FOR_EIGHT))
    return curve(directory)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=["fsdp", "tensor", "mixed"])
def test_meshes_of_eight_train_like_one_device(
    mesh, recipe_file, on_one_device, tmp_path, script_environment
):
    """More devices than cores: without `cpu_devices.divide` a collective of one device waits for another's."""
    keys = [
        f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    ]
    run = start_training(
        recipe_file, tmp_path / "run", script_environment, *ROWS_FOR_EIGHT, *keys, **tiny.fake_devices(8)
    )
    finish(run)
    np.testing.assert_allclose(curve(tmp_path / "run"), on_one_device, rtol=1e-3)


@pytest.mark.slow
def test_a_cpu_that_is_two_devices_trains_like_one(recipe_file, on_one_device, tmp_path, script_environment):
    key = "--config.mesh.cpu_devices=2"
    run = start_training(recipe_file, tmp_path / "run", script_environment, *ROWS_FOR_EIGHT, key)
    assert "mesh {'data': 2, " in finish(run)
    np.testing.assert_allclose(curve(tmp_path / "run"), on_one_device, rtol=1e-4)


def start_processes(
    count, recipe_file, directory, environment, coordinator, *arguments, before=("train.py",)
):
    """The same command as on `count` hosts."""
    return [
        start_training(
            recipe_file,
            directory,
            environment,
            "--distributed",
            *arguments,
            before=before,
            JAX_PLATFORMS="cpu",
            JAX_COORDINATOR_ADDRESS=coordinator,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(index),
        )
        for index in range(count)
    ]


def assert_close(run, other):
    """The same parameters and curves, but for what another order of additions rounds differently."""
    for stage in ("pretrain", "finetune"):
        one, two = (paths.flatten(load_whole(each / "params" / stage)) for each in (run, other))
        for path, leaf in one.items():
            np.testing.assert_allclose(leaf, two[path], rtol=1e-3, atol=1e-4, err_msg=path)
    np.testing.assert_allclose(curve(run), curve(other), rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2}, {"fsdp": 2, "sequence": 2}], ids=str)
def test_processes_train_like_one(mesh, recipe_file, unbroken, tmp_path, script_environment, coordinator):
    """As on two hosts: each reads its rows, they write one work directory and (stage 1) one feature cache together.

    As on four, of which two each hold the halves of the same rows.
    """
    keys = ["--config.mesh.data=1", *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items())]
    keys.append("--config.stages.pretrain.cache_features=True")
    count = math.prod(mesh.values())
    run = tmp_path / "run"
    for process in start_processes(count, recipe_file, run, script_environment, coordinator, *keys):
        finish(process)
    assert list((run / "data" / "features").glob("*/*.features"))
    assert_close(run, unbroken)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 32  # only the first one writes


def another(coordinator):
    """The address that the processes of a restart take."""
    return f"127.0.0.1:{int(coordinator.rpartition(':')[2]) + 1}"


ON_TWO = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
ON_FOUR = (*ON_TWO, "--config.mesh.sequence=2")


@pytest.mark.slow
@pytest.mark.parametrize(("dead", "count", "mesh"), [(0, 2, ON_TWO), (1, 4, ON_FOUR)], ids=["0", "1"])
def test_the_death_of_a_process_ends_the_others_and_the_job_goes_on(
    dead, count, mesh, recipe_file, unbroken, tmp_path, script_environment, coordinator
):
    """kill -9 of the first of two, which the other asks who is there, and of the second; then as many or more go on."""
    run = tmp_path / "run"
    started = start_processes(2, recipe_file, run, script_environment, coordinator, *ON_TWO)
    kill_in_stage(started.pop(dead), run, "finetune", after=random.randint(7, 12))
    died = time.time()
    said = started[0].communicate(timeout=120)[0]
    assert time.time() - died < 60
    assert started[0].returncode not in (0, None)
    # JAX may be faster where the first one is gone, whose service it asks; it calls it the leader.
    named = f"process {dead} of this run has died" in said
    assert named or (dead == 0 and "the leader" in said), said
    again = start_processes(count, recipe_file, run, script_environment, another(coordinator), *mesh)
    output = [finish(process) for process in again]
    assert re.search(r"stage finetune: continuing after step \d+", output[0])
    assert_close(run, unbroken)


FAILS = """import runpy, jax
from mllm_jax.training.metrics import RunLog
add = RunLog.add
def failing(log, step, *rest):
    if jax.process_index() == 1 and step == 8:
        raise RuntimeError("a mistake of ours")
    add(log, step, *rest)
RunLog.add = failing
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_an_error_that_only_one_process_has_ends_the_others_and_the_job_goes_on(
    recipe_file, unbroken, tmp_path, script_environment, coordinator
):
    """They would wait in the next step, and the one with the error for them at its exit."""
    (tmp_path / "fails.py").write_text(FAILS)
    run, fails = tmp_path / "run", (tmp_path / "fails.py",)
    started = start_processes(2, recipe_file, run, script_environment, coordinator, *ON_TWO, before=fails)
    said = [started[1].communicate(timeout=300)[0]]
    ended = time.time()
    said.insert(0, started[0].communicate(timeout=120)[0])
    assert time.time() - ended < 60
    assert [process.returncode for process in started] == [1, 1], said
    assert "RuntimeError: a mistake of ours" in said[1].splitlines()[-1]
    assert "process 1 of this run has failed (RuntimeError: a mistake of ours); its own output" in said[0]
    assert "Traceback" not in said[0]
    again = start_processes(2, recipe_file, run, script_environment, another(coordinator), *ON_TWO)
    output = [finish(process) for process in again]
    assert "stage pretrain: continuing after step 6" in output[0]
    assert_close(run, unbroken)


JOIN = """import runpy, sys, jax
jax.distributed.initialize(sys.argv.pop(1), 2, int(sys.argv.pop(1)))
runpy.run_path("train.py", run_name="__main__")
"""


CANNOT_READ = JOIN.replace(
    "runpy.run_path",
    """from mllm_jax.data.rows import RowEncoder
encode, made = RowEncoder.__call__, []
def failing(encoder, samples):
    made.append(samples)
    if jax.process_index() == 1 and len(made) > 10:
        raise OSError("a disk of this host only cannot be read")
    return encode(encoder, samples)
RowEncoder.__call__ = failing
runpy.run_path""",
)


@pytest.mark.slow
def test_a_host_that_cannot_read_ends_the_others_too(recipe_file, tmp_path, script_environment, coordinator):
    """They would wait in the step that it does not take part in; so it goes on with empty rows to the next meeting."""
    (tmp_path / "join.py").write_text(CANNOT_READ)
    runs = [
        start_training(
            recipe_file,
            tmp_path / "run",
            script_environment,
            "--config.stages.pretrain.log_every=4",
            "--config.stages.pretrain.checkpoint_every=8",
            before=(tmp_path / "join.py", coordinator, str(index)),
            JAX_PLATFORMS="cpu",
        )
        for index in range(2)
    ]
    said = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [1, 1], said
    assert "OtherProcessError: another process has failed (step 8); its message says why" in said[0]
    assert "OSError: a disk of this host only cannot be read" in said[1]
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")["pretrain"]] == [4]
    assert not list((tmp_path / "run" / "checkpoints" / "pretrain").glob("[0-9]*"))


def curve(directory):
    """(step, loss, gradient norm) of both stages."""
    metrics = read_metrics(directory / "metrics.jsonl")
    return [
        (r["step"], r["loss"], r["grad_norm"]) for stage in ("pretrain", "finetune") for r in metrics[stage]
    ]


def load_whole(directory):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        tree = reader.metadata(directory).item_metadata.tree
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # other devices may have written it
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
    return load_params(directory, like)


# --------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_a_misspelt_flag_of_the_real_command_is_one_message(run_script, tmp_path):
    done = run_script(
        "train.py",
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.model.conector.name=linear",
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ConfigError: unknown config key 'model.conector'; did you mean 'model.connector'? valid here:"
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def parse(train_script, monkeypatch):
    """Parses a command line as `script.run` does; flags are as before afterwards."""

    def run(*arguments):
        argv = ["train.py", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        script._parse(argv)
        return train_script.CONFIG.value

    yield run
    flags.FLAGS.unparse_flags()


# ml_collections loads recipes in a way that Python 3.12 warns of.
recipe_loading = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
QUICKSTART = f"--config={ROOT}/configs/quickstart.py"


@recipe_loading
def test_overrides_reach_the_configuration(parse):
    config = parse(
        f"{QUICKSTART}:average_pool",
        "--workdir=x",
        "--config.stages.finetune.steps=3",
        "--config.stages.finetune.trainable=('connector/.*',)",
        "--config.model.connector.average_pool.tokens=9",
    )
    assert config.model.connector.name == "average_pool"
    assert config.model.connector.average_pool.tokens == 9
    assert config.stages.finetune.steps == 3
    assert config.stages.finetune.trainable == ("connector/.*",)


@recipe_loading
def test_the_command_line_adds_sources_and_benchmarks(parse):
    own = f"--config={ROOT}/configs/own_data.py:finetune"
    config = parse(
        own,
        "--workdir=x",
        "--config.stages.finetune.sources.more.images=b",
        "--config.stages.finetune.sources.more.json=b.json",
        "--config.stages.finetune.sources.more.weight=2",
        "--config.eval.benchmarks.gqa.path=gqa",
        "--config.eval.benchmarks.gqa.kind=gqa",
    )
    assert set(config.stages.finetune.sources) == {"main", "more"}
    more = config.stages.finetune.sources.more
    assert (more.kind, more.json, more.images, more.weight) == ("llava", "b.json", "b", 2.0)
    assert set(config.eval.benchmarks) == {"main", "gqa"}
    assert config.eval.benchmarks.gqa.kind == "gqa"


@recipe_loading
def test_home_is_expanded_in_flags_and_keys(parse, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.py"
    text = "from mllm_jax.config import default_config\n\ndef get_config():\n    config = default_config()\n"
    recipe.write_text(text + "    config.model.vision.path = '~/tower'\n    return config\n")
    config = parse("--config=~/recipe.py", "--workdir=~/run", "--config.model.llm.path=~/llm")
    assert flags.FLAGS.workdir == f"{tmp_path}/run"
    assert config.model.llm.path == f"{tmp_path}/llm"
    assert config.model.vision.path == f"{tmp_path}/tower"  # that of a recipe, too


@recipe_loading
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([QUICKSTART, "--workdir=s3://bucket/x"], "ConfigError: --workdir: s3://bucket/x is object storage"),
        ([QUICKSTART, "--config.data.dir=s3://b/x"], "--config.data.dir: s3://b/x is object storage"),
        (
            [f"--config={ROOT}/configs/own_data.py:all"],
            "ConfigError: configs/own_data.py:all: choose both, pretrain or finetune",
        ),
        (
            [f"{QUICKSTART}:average_pool", "--config.model.connector.tokens=16"],
            "'model.connector.tokens'; there is 'model.connector.average_pool.tokens'; valid here:",
        ),
        ([QUICKSTART, "--config.lr=1"], "there is 'stages.*.learning_rate'; valid here: data, eval"),
        (
            [QUICKSTART, "--config.stages.finetune.sources.more.weight=2"],
            "valid here: instructions; give --config.stages.finetune.sources.more.json or "
            "--config.stages.finetune.sources.more.kind to add it",
        ),
        ([QUICKSTART, "--config.model.conector.name=x"], "'model.conector'; did you mean 'model.connector'?"),
        ([QUICKSTART, "--config.model.dtype.x=3"], "'model.dtype' holds a value, so there is no"),
        (
            [QUICKSTART, "--config.model.connector.dci.groups=3"],
            "than the chosen 'mlp2x_gelu'; leave it out, or add --config.model.connector.name=dci",
        ),
        (["--config=configs/nowhere.py"], "--config: there is no recipe configs/nowhere.py"),
        (["--config", "configs/nowhere.py"], "--config: there is no recipe configs/nowhere.py"),
        ([QUICKSTART, "--config.seed=x"], "flag --config.seed=x: invalid literal for int()"),
        ([], "Flag --config must have a value other than None; --help shows the options"),
        ([f"--config={ROOT}/README.md"], "README.md; give a Python file or one that comes with the library"),
    ],
)
def test_wrong_flags_end_in_one_message(parse, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        parse("--workdir=x", *arguments)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err


@recipe_loading
def test_a_file_without_a_configuration_is_no_recipe(parse, capsys, monkeypatch):
    # ml_collections' name of the last recipe
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with pytest.raises(SystemExit):
        parse(f"--config={ROOT}/mllm_jax/line_file.py", "--workdir=x")
    said = "line_file.py has no get_config, the function that returns the configuration"
    assert said in capsys.readouterr().err


@recipe_loading
def test_errors_of_the_users_making_are_one_message_and_others_keep_their_traceback(parse, capsys):
    parse(QUICKSTART, "--workdir=x")

    def fail(error):
        def main(_):
            raise error

        return main

    for error in (
        ConfigError("config key 'x'"),
        FileNotFoundError("no such file: a.json"),
        OSError(28, "No space left on device"),
        NonFiniteLoss("at step 3"),
    ):
        with pytest.raises(SystemExit) as stop:
            script._guarded(fail(error), [])
        assert stop.value.code == 1
        assert capsys.readouterr().err == f"{type(error).__name__}: {error}\n"
    with pytest.raises(SystemExit):
        script._guarded(fail(SampleTooLong("endless", 9, 8)), [])
    assert re.search(
        r"'endless': has 9 tokens .*; raise .*seq_len.*overlong=skip\n$", capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as stop:
        script._guarded(fail(KeyboardInterrupt()), [])
    assert stop.value.code == 130
    assert "the same command continues" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        script._guarded(fail(ZeroDivisionError()), [])
    flags.FLAGS.traceback = True
    with pytest.raises(ConfigError):
        script._guarded(fail(ConfigError("x")), [])
    flags.FLAGS.traceback = False
