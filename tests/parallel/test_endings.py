"""Where one of several processes ends, the others stop soon and name it; real ones, and the rules one by one."""

import pathlib
import subprocess
import sys
import time

import jax
import pytest

from mllm_jax.parallel import endings

SCRIPT = pathlib.Path(__file__).parent / "ending_process.py"
DISK = "OSError: a disk of this host only cannot be read"
GONE = (
    "process 1 of this run has died or cannot be reached; its own output says why. Start all processes again"
)


@pytest.fixture
def run(script_environment, coordinator, tmp_path):
    """Ends process `who` of `count` and gives what each has said, its exit code, and how long it took all to end."""

    def start(index, count, who, how):
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, SCRIPT, str(who), how]
        with open(tmp_path / f"{index}.txt", "w") as said:
            return subprocess.Popen(
                command, env=script_environment | variables, stdout=said, stderr=subprocess.STDOUT
            )

    def run(count, who, how):
        started = [start(index, count, who, how) for index in range(count)]
        while "begun" not in (tmp_path / f"{who}.txt").read_text() and started[who].poll() is None:
            time.sleep(0.01)
        begun = time.monotonic()
        codes = [process.wait(timeout=120) for process in started]
        seconds = time.monotonic() - begun
        return [(tmp_path / f"{index}.txt").read_text() for index in range(count)], codes, seconds

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "own", "told"),
    [
        ("mistake", 1, "Traceback", "has failed (ZeroDivisionError: a mistake of ours)"),
        ("thread", 1, DISK, f"has failed ({DISK})"),
        ("exit", 3, "", "has failed (SystemExit: 3)"),
        ("interrupt", 130, "interrupted; the same command continues", "has failed (KeyboardInterrupt: )"),
    ],
)
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_fails_is_told_to_those_that_wait_for_it(run, who, how, code, own, told):
    """Whatever it fails with; the first process is the one that all others ask."""
    said, codes, seconds = run(2, who, how)
    assert codes[who] == code, said
    assert codes[1 - who] == 1, said
    assert seconds < 30
    assert own in said[who]
    assert said[who].count("closed") == 1
    assert "of this run" not in said[who]
    assert said[1 - who].count(f"process {who} of this run {told}; its own output says why") == 1, said
    assert "went on without" not in said[1 - who]


def test_a_process_that_waits_while_it_closes_leaves_all_the_same(run):
    said, codes, seconds = run(2, 1, "closing")
    assert codes == [1, 1], said
    assert seconds < 30
    assert DISK in said[1]
    assert f"process 1 of this run has failed ({DISK}); its own output says why" in said[0]


@pytest.mark.slow
def test_those_who_miss_a_process_that_was_killed_find_out_which(run):
    said, codes, seconds = run(3, 1, "kill")
    assert codes == [1, -9, 1], said
    assert seconds < 60
    assert said[0].count(GONE) == 1, said
    assert said[2].count(GONE) == 1, said


@pytest.mark.slow
def test_what_all_know_of_ends_in_the_usual_way(run):
    said, codes, _ = run(2, 1, "agreed")
    assert codes == [1, 1], said
    assert DISK in said[1]
    assert "OtherProcessError: another process has failed (files read); its message says why" in said[0]
    assert not any("of this run" in each for each in said)


@pytest.fixture
def left(monkeypatch):
    """Exit codes with which a process of several has left at once."""
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(endings.global_state, "num_processes", 2)
    monkeypatch.setattr(endings.global_state, "process_id", 1)
    monkeypatch.setattr(endings, "CLOSING", 1000)  # the timer is a daemon
    monkeypatch.setattr(endings, "_spoken", endings.threading.Lock())
    monkeypatch.setattr(endings, "_failed", endings.threading.Event())
    monkeypatch.setattr(endings, "_client", Unreachable)
    monkeypatch.setattr(endings.os, "_exit", leave)
    return codes


class Unreachable:
    """The coordination service of a run whose first process is gone."""

    def key_value_dir_get(self, _):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")

    def key_value_set(self, *_, **__):
        self.key_value_dir_get(None)


def fail(first, second=None):
    try:
        with endings.told():
            raise first
    finally:
        if second is not None:
            raise second


GLOO = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer"
LOST = jax.errors.JaxRuntimeError(GLOO)


@pytest.mark.parametrize("lost", [LOST, ValueError(GLOO)], ids=["runtime", "dispatch"])
@pytest.mark.parametrize("later", [None, ValueError("a checkpoint could not be written; make room")])
def test_the_loss_of_another_process_is_told_and_not_what_fails_after_it(left, capfd, lost, later):
    with pytest.raises(SystemExit), endings.told():
        fail(lost, later)
    said = capfd.readouterr().err
    assert left == [1]
    assert said.count("process 0 of this run has died or cannot be reached") == 1
    assert "make room" not in said


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (OSError("an own disk"), LOST),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), None),
        (ValueError("no connection: check the socket of the judge"), None),
    ],
)
def test_an_error_of_its_own_is_not_laid_on_another_process(left, capfd, first, second):
    with pytest.raises(type(second or first)), endings.told():
        fail(first, second)
    assert not left
    assert "of this run" not in capfd.readouterr().err


@pytest.mark.parametrize("filtering", ["quiet_remove_frames", "remove_frames"])
@pytest.mark.parametrize("own", [True, False])
def test_what_came_first_is_found_behind_what_jax_puts_between(left, capfd, own, filtering):
    """To show a shorter traceback, it gives an error another cause, which keeps the earlier ones."""

    def lose(_):
        raise jax.errors.JaxRuntimeError(GLOO)

    def work():
        try:
            if own:
                raise OSError("an own disk")
        finally:
            jax.jit(lose)(1.0)

    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", filtering)
    try:
        with pytest.raises(jax.errors.JaxRuntimeError), endings.told():
            work()
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert ("process 0 of this run has died" in capfd.readouterr().err) != own


@pytest.mark.parametrize("known", [endings.agreed(OSError("disk full")), SystemExit(0)])
def test_what_all_raise_and_what_is_no_failure_keep_the_usual_way(left, known):
    wrapped = SystemExit(1 if known.args == ("disk full",) else 0)
    try:
        try:
            fail(known)
        except BaseException:
            raise wrapped from None
    except SystemExit as error:
        endings.leave(error)
    assert not left
    endings._failed.clear()
    other = OSError("only here")
    with pytest.raises(SystemExit):
        endings.leave(other)
    assert left == [1]


def test_the_first_process_keeps_what_is_told_until_all_have_read_it(left, monkeypatch):
    """Also where its listener has told the user, and what it computed with the one that is gone fails after that."""
    slept = []
    monkeypatch.setattr(endings.global_state, "process_id", 0)
    monkeypatch.setattr(endings.time, "sleep", slept.append)
    endings._spoken.acquire()
    with pytest.raises(SystemExit), endings.told():
        raise jax.errors.JaxRuntimeError(GLOO)
    assert (left, slept) == ([1], [endings.ANSWERED])


def test_a_service_that_once_does_not_answer_is_asked_again(left, monkeypatch):
    answers = [
        jax.errors.JaxRuntimeError("UNAVAILABLE: try again"),
        [(f"{endings.FOLDER}/ended/0", "has failed")],
    ]

    class Client:
        def key_value_dir_get(self, _):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(endings, "_client", Client)
    monkeypatch.setattr(endings, "LISTEN", 0.001)
    monkeypatch.setattr(endings, "ANSWERED", 0.001)
    with pytest.raises(SystemExit):
        endings._listen(endings.threading.Event())
    assert left == [1]
