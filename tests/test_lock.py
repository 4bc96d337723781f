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
    holder = {**lock._this_process(), **changes}
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
        lock._acquire(tmp_path / "lock", "mine")
    other.kill()  # and not waited for: a zombie is gone, too
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["process"] == os.getpid()


def test_another_program_with_the_number_of_the_holder_does_not_keep_it(tmp_path):
    write(tmp_path, process=os.getppid(), born="1")
    with lock.locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", '{"host": "a', "[]"])
def test_a_damaged_file_is_nobodys(tmp_path, text):
    (tmp_path / "lock").write_text(text)
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
        lock._acquire(tmp_path / "lock", "mine")
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


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"), lock.locked(tmp_path):
        pass
    assert (tmp_path / "target").read_text() == "precious"
