"""Joining the processes of a run: what the environment must say, and mistakes named."""

import jax
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.parallel import processes

ALWAYS = {"heartbeat_timeout_seconds": processes.HEARTBEAT, "local_device_ids": None}


@pytest.fixture
def asked(monkeypatch):
    """What JAX is asked for; it answers as where it detects no launcher."""
    calls = []

    def initialize(**given):
        calls.append(given)
        if None in (given["num_processes"], given["process_id"]):
            raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in (processes.ADDRESS, processes.COUNT, processes.INDEX):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_environment_says_which_process_this_is(asked, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    processes.join()
    assert asked == [{"num_processes": 3, "process_id": 0, **ALWAYS}]


def test_what_is_missing_is_named(asked, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError) as caught:
        processes.join()
    assert str(caught.value).startswith(
        "--distributed: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not set, and JAX detects no launcher (Slurm, "
    )
    assert asked == [{"num_processes": 2, "process_id": None, **ALWAYS}]


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        ("JAX_COORDINATOR_ADDRESS", "10.0.0.1", "HOST:PORT"),
        ("JAX_NUM_PROCESSES", "two", "a number"),
        ("JAX_PROCESS_ID", "-1", "a number"),
    ],
)
def test_a_malformed_variable_is_named(asked, monkeypatch, name, value, form):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"variable {name} is '{value}', not {form}"):
        processes.join()
    assert not asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        (
            ("train.py", "--config=configs/quickstart.py"),
            {},
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID not set, and JAX detects no launcher",
        ),
        (
            ("eval.py",),
            {
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:1, JAX_NUM_PROCESSES=2, JAX_PROCESS_ID=2 (JAX: process_id",
        ),
    ],
)
def test_the_real_commands_end_in_one_message(run_script, tmp_path, command, variables, message):
    unset = dict.fromkeys((processes.ADDRESS, processes.COUNT, processes.INDEX), "")
    done = run_script(*command, f"--workdir={tmp_path / 'run'}", "--distributed", **unset | variables)
    assert done.returncode == 1
    assert f"ConfigError: --distributed: {message}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_of_one_process_ends_the_others_too(as_processes, broken):
    began = []

    def work(index):
        began.append(index)
        if index == broken:
            raise OSError("disk full")
        return index

    found = as_processes(lambda index: processes.first_then_others(lambda: work(index), "data prepared"))
    assert began == [0, 1][: broken + 1]
    assert str(found[broken]) == "disk full"
    assert isinstance(found[1 - broken], processes.OtherProcessError)
    assert "data prepared" in str(found[1 - broken])


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_between_meetings_is_kept_until_the_next(as_processes, broken):
    """In between the other process waits for this one's part of what the devices compute together."""
    steps = []

    def work(index):
        late = processes.Postponed()
        for step in range(6):
            with late:
                if index == broken and step >= 1:
                    raise OSError(f"cannot read at step {step}")
            steps.append((index, step))
            if step % 3 == 2:
                late.meet("samples read")

    found = as_processes(work)
    assert sorted(steps) == [(index, step) for index in range(2) for step in range(3)]
    assert str(found[broken]) == "cannot read at step 1"
    assert isinstance(found[1 - broken], processes.OtherProcessError)


def test_a_single_process_raises_at_once():
    late = processes.Postponed()
    with pytest.raises(OSError, match="now"), late:
        raise OSError("now")
    late.meet("nothing kept")
