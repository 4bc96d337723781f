"""How train.py and eval.py start."""

import os
import sys

import pytest

from mllm_jax.cli import script


@pytest.fixture
def started(monkeypatch):
    """Arguments of every `os.execv`, which is not carried out."""
    calls = []
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # coverage traces
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is as before afterwards
    monkeypatch.delenv("GLIBC_TUNABLES")
    return calls


def test_a_script_starts_once_more_with_huge_pages(started):
    script._use_huge_pages()
    assert started == [(sys.executable, sys.orig_argv)]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    script._use_huge_pages()  # the second start
    assert len(started) == 1


@pytest.mark.parametrize(("name", "value"), [("platform", "darwin"), ("gettrace", lambda: print)])
def test_not_elsewhere_nor_under_a_debugger(started, monkeypatch, name, value):
    monkeypatch.setattr(sys, name, value)
    script._use_huge_pages()
    assert not started
    assert "GLIBC_TUNABLES" not in os.environ


def test_an_environment_that_sets_it_is_left_alone(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    script._use_huge_pages()
    assert not started
