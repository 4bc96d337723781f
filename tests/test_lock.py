"""The lock of a work directory: who holds it is kept, who is gone is replaced."""

import json
import os
import socket
import subprocess
import sys

import pytest

from mllm_jax import lock
from mllm_jax.config import ConfigError

HOLD = """
import pathlib, sys, time
from mllm_jax.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path, script_environment):
    """Another process that holds the directory."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=script_environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def write(directory, **changes):
    """A lock file that somebody left."""
    holder = {**lock.this_process(), **changes}
    (directory / "lock").write_text(json.dumps(holder))
    return holder


def test_it_names_host_and_process_and_is_removed(tmp_path):
    with lock.locked(tmp_path):
        holder = json.loads((tmp_path / "lock").read_text())
        assert (holder["host"], holder["process"]) == (socket.gethostname(), os.getpid())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), lock.locked(tmp_path):
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_keeps_it_and_a_killed_one_is_replaced(tmp_path, other):
    with pytest.raises(ConfigError, match=rf"is in use by process {other.pid} on {socket.gethostname()} "):
        lock._acquire(lock.Lock(tmp_path / "lock", "mine"))
    other.kill()  # and not waited for: a zombie is gone, too
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_another_program_with_the_number_of_the_holder_does_not_keep_it(tmp_path):
    write(tmp_path, process=os.getppid(), born="1")
    with lock.locked(tmp_path):
        pass


DAMAGED = [
    *(b"", b"[]", b"[" * 100_000, b'{"host": "a', b'{"host": "\xff'),
    *(b'{"host": "a", "process": "x"}', b'{"host": "a", "process": 0}'),
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_file_is_nobodys(tmp_path, data):
    (tmp_path / "lock").write_bytes(data)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"namespace": "pid:[1]"}])
def test_a_silent_holder_elsewhere_is_replaced_after_a_while(tmp_path, monkeypatch, place):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    write(tmp_path, process=1, **place)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_a_holder_elsewhere_that_shows_a_sign_of_life_keeps_it(tmp_path, monkeypatch):
    holder = write(tmp_path, host="elsewhere")
    monkeypatch.setattr(
        lock.time, "sleep", lambda _: os.utime(tmp_path / "lock", (1, 1))
    )  # it beats meanwhile
    with pytest.raises(ConfigError, match=r"in use by process \d+ on elsewhere"):
        lock._acquire(lock.Lock(tmp_path / "lock", "mine"))
    assert json.loads((tmp_path / "lock").read_text()) == holder


def test_the_holder_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock.locked(tmp_path):
        os.utime(tmp_path / "lock", (1, 1))
        for _ in range(1000):
            if (tmp_path / "lock").stat().st_mtime > 1:
                break
            lock.time.sleep(0.01)
        else:
            raise AssertionError("the file was not touched")


def test_a_holder_that_was_suspended_learns_that_another_run_has_the_directory(tmp_path):
    with lock.locked(tmp_path) as held:
        held.check()
        holder = write(tmp_path, host="elsewhere", process=17)
        with pytest.raises(
            lock.LockLostError, match=r"was taken over by process 17 on elsewhere .* stood still"
        ):
            held.check()
        assert json.loads((tmp_path / "lock").read_text()) == holder
    assert json.loads((tmp_path / "lock").read_text()) == holder  # it is not ours to remove


def test_a_lock_that_is_gone_is_lost(tmp_path):
    """The other run has come and gone, or somebody did what the message about a dead holder says."""
    with lock.locked(tmp_path) as held:
        (tmp_path / "lock").unlink()
        with pytest.raises(lock.LockLostError, match="is gone"):
            held.check()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_does_not_answer_does_not_end_a_run(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    with lock.locked(tmp_path) as held, monkeypatch.context() as patch:
        patch.setattr(lock.pathlib.Path, "read_text", fail)
        held.check()


def test_the_heart_goes_on_after_bytes_that_are_not_text(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock.locked(tmp_path) as held:
        (tmp_path / "lock").write_bytes(b"\xff")
        lock.time.sleep(0.1)
        (tmp_path / "lock").write_text(held.text)
        os.utime(tmp_path / "lock", (1, 1))
        for _ in range(1000):
            if (tmp_path / "lock").stat().st_mtime > 1:
                break
            lock.time.sleep(0.01)
        else:
            raise AssertionError("the heartbeat has ended")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"), lock.locked(tmp_path):
        pass
    assert (tmp_path / "target").read_text() == "precious"
