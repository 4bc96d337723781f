"""Services beside TensorBoard, by modules that stand for them."""

import json
import sys
import threading
import types

import pytest

from mllm_jax.config import ConfigError, default_config
from mllm_jax.training import tracking
from mllm_jax.training.tracking import check_tracking, tracked

FIGURES = {"step": 2, "loss": 1.5}


def config(service):
    made = default_config()
    made.tracking.service, made.tracking.project = service, "mine"
    return made


@pytest.fixture
def calls(monkeypatch):
    """What fake wandb and trackio were called with, as (name, arguments); `calls.fail` makes that call raise."""

    class Calls(list):
        fail = None

        def taking(self, name):
            def call(*arguments, **named):
                self.append((name, arguments, named))
                if name == self.fail:
                    raise ConnectionError("no network")
                return run

            return call

    found = Calls()
    functions = {name: found.taking(name) for name in ("init", "log", "finish", "define_metric")}
    run = types.SimpleNamespace(**functions)
    for service in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, service, types.SimpleNamespace(**functions, __spec__=object()))
    return found


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_continued_run_is_the_same_run_there(service, calls, tmp_path):
    check_tracking(config(service))
    for _ in range(2):
        with tracked(config(service), tmp_path) as log:
            log("pretrain", FIGURES)
    assert [name for name, *_ in calls if name != "define_metric"] == ["init", "log", "finish"] * 2
    first, second = (named for name, _, named in calls if name == "init")
    assert first == second
    assert (first["project"], first["resume"]) == ("mine", "allow")
    assert first["config"]["tracking"]["service"] == service
    assert json.loads((tmp_path / "tracking.json").read_text())["id"] in first.get("id", first["name"])
    sent = next(arguments for name, arguments, _ in calls if name == "log")
    assert sent == ({"pretrain/step": 2, "pretrain/loss": 1.5},)


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_a_service_that_fails_stops_nothing(service, fail, calls, tmp_path, capsys):
    calls.fail = fail
    with tracked(config(service), tmp_path) as log:
        log("pretrain", FIGURES)
        log("pretrain", FIGURES)
    assert sum(name == fail for name, *_ in calls) == 1  # not asked again
    assert capsys.readouterr().out.count("ConnectionError: no network") == 1


def test_a_service_that_never_ends_is_left(calls, tmp_path, capsys, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(sys.modules["trackio"], "finish", never.wait)
    monkeypatch.setattr(tracking, "PATIENCE", 0.01)
    with tracked(config("trackio"), tmp_path):
        pass
    never.set()
    assert "has not taken the last figures" in capsys.readouterr().out


def test_an_error_of_the_run_goes_through(calls, tmp_path):
    with pytest.raises(KeyError), tracked(config("wandb"), tmp_path):
        raise KeyError
    assert calls[-1][0] == "finish"


def test_a_missing_package_is_named_before_any_compute(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    check_tracking(config("none"))
    with pytest.raises(ConfigError, match=r"pip install 'mllm-jax\[wandb\]'"):
        check_tracking(config("wandb"))


def test_without_a_service_nothing_is_written(tmp_path):
    with tracked(config("none"), tmp_path) as log:
        log("pretrain", FIGURES)
    assert not any(tmp_path.iterdir())
