"""A share of the fuzzing of all readers (`python tests/security/fuzz.py` runs more), and what its guard sees."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys

import pytest
import tiny
from guard import ROOT, Guard, Outside

FUZZ = ROOT / "tests" / "security" / "fuzz.py"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in /proc")
def test_a_share_of_the_changed_files():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, str(FUZZ), "--inputs=300"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = re.findall(r"^(\S.*?) {2,}(\d+) ", ran.stdout, re.MULTILINE)
    assert len(rows) > 20
    assert all(int(count) > 5 for _, count in rows)


UNCHECKED = """
import sys
sys.path[:0] = sys.argv[1:]
import fuzz, readers
reader = readers.READERS["PEFT adapter"]
readers.READERS = {name: readers.dataclasses.replace(reader, read=read) for name, read in (
    ("checks", reader.read), ("does not check", lambda folder, out, rng: None)
)}
fuzz.child(40, 0, "")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in /proc")
def test_a_reader_that_refuses_nothing_is_a_fault(tmp_path):
    folders = [ROOT / "tests" / name for name in ("security", "", "evaluation", "interop")]
    ran = subprocess.run(
        [sys.executable, "-c", UNCHECKED, *map(str, folders)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "FUZZ_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [row for row in map(json.loads, ran.stdout.splitlines()) if "reader" in row]
    assert {row["reader"]: row["faults"] for row in rows} == {
        "checks": [],
        "does not check": ["does not check: refuses 0 of 20, fewer than 30%"],
    }


@pytest.fixture
def guard(tmp_path):
    (tmp_path / "inside").mkdir()
    guard = Guard(tmp_path / "inside")
    yield guard
    guard.watching = False


class _Pickled:
    def __reduce__(self):
        return (len, ("x",))


def _link(tmp_path):
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside.txt")
    (tmp_path / "inside" / "link").read_text()


def _planted(tmp_path):
    file = tmp_path / "inside" / "planted.py"
    file.write_text("x = 1\n")
    exec(compile(file.read_text(), str(file), "exec"))


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda folder: (folder / "outside.txt").read_text(), "opened .*outside.txt"),
        (lambda folder: (folder / "outside.txt").write_text("x"), "opened .* for writing"),
        (_link, "opened .*link"),
        (_planted, "ran .*planted.py"),
        (lambda _: subprocess.run(["true"], check=False), "subprocess.Popen"),
        (lambda _: os.system("true"), "os.system"),
        (lambda _: socket.socket().connect_ex(("127.0.0.1", 9)), "socket.connect"),
        (lambda _: pickle.loads(pickle.dumps(_Pickled())), "unpickled"),
        (lambda folder: os.rename(folder / "outside.txt", folder / "inside" / "x"), "os.rename"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_guard_sees(act, said, guard, tmp_path):
    (tmp_path / "outside.txt").write_text("x")
    guard.watching = True
    act(tmp_path)
    guard.watching = False
    assert any(re.match(said, one) for one in guard.found), guard.found


def test_what_is_allowed_is_not_reported(guard, tmp_path):
    (tmp_path / "inside" / "a.txt").write_text("x")
    guard.watching = True
    (tmp_path / "inside" / "a.txt").read_text()
    (ROOT / "pyproject.toml").read_text()
    (tmp_path / "inside" / "b.txt").write_text("x")
    guard.watching = False
    assert guard.found == []


def test_changes_outside_are_seen(tmp_path):
    outside = Outside(tmp_path / "outside", tiny.png(0, (2, 2)))
    assert outside.changed() == ""
    (tmp_path / "outside" / "secret.txt").write_text("other")
    assert "secret.txt" in outside.changed()
