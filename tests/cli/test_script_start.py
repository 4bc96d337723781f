"""How train.py and eval.py start."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from mllm_jax.cli import huge_pages, script
from mllm_jax.data.tokens import SampleTooLong

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def started(monkeypatch):
    """Arguments of every `os.execv`, which is not carried out."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # coverage traces
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is as before afterwards
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return calls


def test_a_script_starts_once_more_with_huge_pages(started):
    huge_pages.start_again()
    assert started == [(sys.executable, sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    huge_pages.start_again()  # the second start
    assert len(started) == 1


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (sys, "platform", "darwin"),
        (sys, "gettrace", lambda: print),
        (jax.distributed, "is_initialized", lambda: True),
        (importlib.util, "find_spec", lambda name: name == "libtpu"),
    ],
)
def test_not_elsewhere_nor_in_a_program_that_cannot_be_left(started, monkeypatch, where, name, value):
    monkeypatch.setattr(where, name, value)
    huge_pages.start_again()
    assert not started
    assert "GLIBC_TUNABLES" not in os.environ


def test_a_plugin_does_not_count_where_jax_is_told_to_use_the_cpu(started, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    huge_pages.start_again()
    assert len(started) == 1


def test_an_environment_that_sets_it_is_left_alone(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    huge_pages.start_again()
    assert not started


def test_the_second_start_has_the_arguments_of_the_first(script_environment):
    code = "import os, sys; from mllm_jax.cli import huge_pages; huge_pages.start_again(); "
    code += "from mllm_jax.cli import script; "
    code += "script.run(lambda _: print(sys.argv[1:], os.environ['GLIBC_TUNABLES']))"
    environment = {key: value for key, value in script_environment.items() if key != "GLIBC_TUNABLES"}
    environment["JAX_PLATFORMS"] = "cpu"  # libtpu may be there to plan with
    done = subprocess.run(
        [sys.executable, "-c", code, "--log_dir=a b", "--traceback"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout == "['--log_dir=a b', '--traceback'] glibc.malloc.hugetlb=1\n"


def test_a_word_that_is_no_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        script._parse(["train.py", "--notraceback", "=", "3"])
    assert "'=' is no option" in capsys.readouterr().err


def test_the_way_out_stands_behind_the_error(capsys):
    with pytest.raises(SystemExit):
        script._fail(SampleTooLong("a", 9, 8))
    text = capsys.readouterr().err
    assert text.startswith("SampleTooLong: sample 'a': has 9 tokens")
    assert text.endswith(
        "limit of 8; raise the stage's seq_len (data.seq_len where it has none), or set data.overlong=skip\n"
    )


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_the_second_start_comes_before_what_is_slow_to_import(name, script_environment, tmp_path):
    """The first start ends before JAX is imported."""
    (tmp_path / "jax.py").write_text(
        "import os; print(os.environ.get('GLIBC_TUNABLES')); raise SystemExit(3)"
    )
    environment = {key: value for key, value in script_environment.items() if key != "GLIBC_TUNABLES"}
    environment["JAX_PLATFORMS"] = "cpu"  # libtpu may be there to plan with
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), environment["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, ROOT / name], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "glibc.malloc.hugetlb=1\n"), done.stderr
