"""Traces of training steps that XProf reads."""

import contextlib
import gzip
import json

import jax
import jax.numpy as jnp
import pytest
import test_train

from mllm_jax.training.profile import StepProfiler


def traced(folder):
    """(name, step) of the steps in a trace, and the files of it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    (trace,) = [path for path in files if path.name.endswith(".trace.json.gz")]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {
        int(event["args"]["step_num"])
        for event in events
        if event.get("name") == "train" and "step_num" in event.get("args", {})
    }
    return sorted(steps), files


@pytest.mark.slow
def test_a_stage_traces_the_steps_that_are_asked_for(train, tiny_config, tmp_path):
    tiny_config.data.dir = str(tmp_path / "data")
    tiny_config.profile.start, tiny_config.profile.steps = 3, 2
    train.train(tiny_config, tmp_path / "run", evaluate=False)
    for stage in ("pretrain", "finetune"):
        steps, files = traced(tmp_path / "run" / "profile" / stage)
        assert steps == [3, 4]
        (planes,) = [path for path in files if path.name.endswith(".xplane.pb")]
        assert (
            planes.parent.parent == tmp_path / "run" / "profile" / stage / "plugins" / "profile"
        )  # for XProf
    without = tmp_path / "without"
    tiny_config.profile.start = 0
    train.train(tiny_config, without, evaluate=False)
    assert not (without / "profile").exists()
    assert test_train.curve(without) == test_train.curve(tmp_path / "run")


def test_a_stage_that_ends_before_its_trace_keeps_what_there_is(tmp_path):
    with StepProfiler(tmp_path, first=1, steps=9) as profiler:
        for number in (1, 2):
            with profiler.step(number):
                metrics = jnp.ones(3) + number
            profiler.stop_after(number, metrics)
    assert traced(tmp_path)[0] == [1, 2]
    jax.profiler.start_trace(tmp_path / "other")  # none is under way
    jax.profiler.stop_trace()


@pytest.mark.parametrize("first", [0, 4])
def test_steps_that_are_not_asked_for_are_not_traced(tmp_path, first):
    with StepProfiler(tmp_path, first, steps=1) as profiler:
        for number in (1, 2):
            with profiler.step(number):
                pass
            profiler.stop_after(number, jnp.ones(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_trace_that_fails_is_told_and_costs_no_training(tmp_path, monkeypatch, capsys, broken):
    real, outside = getattr(jax.profiler, broken), []

    def fails(*arguments):
        if broken == "stop_trace":
            real()  # for the tests after this one
        raise RuntimeError("Only one profile may be run at a time.")

    @contextlib.contextmanager
    def paused():
        outside.append("begun")
        yield
        outside.append("ended")

    monkeypatch.setattr(jax.profiler, broken, fails)
    trained = []
    with StepProfiler(tmp_path, 2, 1, paused) as profiler:
        for number in (1, 2, 3):
            with profiler.step(number):
                trained.append(number)
            profiler.stop_after(number, jnp.ones(1))
    assert trained == [1, 2, 3]
    assert "steps 2 to 2 is lost, training goes on: RuntimeError: Only one" in capsys.readouterr().err
    assert outside == ["begun", "ended"] * (1 if broken == "start_trace" else 2)


def test_an_error_of_a_step_is_not_taken_for_one_of_its_trace(tmp_path):
    with (
        pytest.raises(ValueError, match="of the step"),
        StepProfiler(tmp_path, 1, 2) as profiler,
        profiler.step(1),
    ):
        raise ValueError("of the step")
    assert traced(tmp_path)[1]
