"""The guide's connector works as printed, and the table of counts is what the code gives."""

import ast
import contextlib
import inspect
import io
import pathlib
import re
import sys
import types

import connector_testing
import pytest
from connector_testing import abstract_params, count

from mllm_jax import connectors

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def rows():
    section = (DOCS / "models.md").read_text().split("## Connectors")[1].split("\n## ")[0]
    found = re.findall(
        r"^\| `(\w+)`(?: `([^`]+)`)? \| [^|]+ \| ([\d,]+) \| ([\d,]+) \| [^|]+ \|$", section, re.M
    )
    return [(name, options, *(int(n.replace(",", "")) for n in counts)) for name, options, *counts in found]


@pytest.mark.parametrize(("name", "options", "tokens", "parameters"), rows())
def test_table(name, options, tokens, parameters):
    key, _, value = options.partition("=")
    vision = connectors.VisionSpec(1024, 24, 23, (24, 24))
    connector = connectors.create(name, vision, 4096, {key: ast.literal_eval(value)} if key else {})
    assert connector.num_tokens(vision.grid) == tokens
    assert count(abstract_params(connector, vision.grid)) == parameters


def test_table_has_every_connector():
    assert {name for name, *_ in rows()} == set(connectors.CONNECTORS)


def test_every_function_of_the_table_exists():
    from mllm_jax.connectors import grids, layers

    section = (DOCS / "connectors.md").read_text().split("## What it may use")[1].split("\n## ")[0]
    for module in (layers, grids):
        named = section.split(module.__name__.rsplit(".", 1)[1] + ".py`")[1].split("Of `mllm")[0]
        for name, arguments in re.findall(r"`(\w+)\(([^`]*)\)`", named):
            parameters = inspect.signature(getattr(module, name)).parameters
            given = [part.split("=")[0].strip() for part in arguments.replace("self", "module").split(",")]
            assert [each for each in given if each not in parameters] == [], name


def test_make_golden_says_what_it_does(run_script):
    done = run_script("tests/connectors/make_golden.py", "--help")
    assert done.returncode == 0
    assert "golden.json" in done.stdout


def test_guide(monkeypatch):
    module, residual, row, use, test = re.findall(
        r"```python\n(.*?)```", (DOCS / "connectors.md").read_text(), re.S
    )
    monkeypatch.setattr(connectors, "CONNECTORS", dict(connectors.CONNECTORS))
    made = types.ModuleType("max_pool_of_the_guide")
    exec(compile(module, "max_pool.py", "exec"), made.__dict__)
    exec(row, {"CONNECTORS": connectors.CONNECTORS, "MaxPool": made.MaxPool})

    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        pytest.raises(ValueError, match=r"max_pool\.side=3 does not divide"),
    ):
        exec(use, {})
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", use)

    twice: dict = {"__name__": "residual_of_the_guide"}
    exec(compile(residual, "residual.py", "exec"), twice)
    connectors.CONNECTORS["residual"] = (twice["Residual"], {})
    made = connectors.create("residual", connectors.VisionSpec(8, 6, 5, (4, 4)), 12)
    parameters = abstract_params(made, (4, 4))
    assert set(parameters) == {"layer_0", "layer_1", "detail_0"}
    assert made.num_tokens((4, 4)) == 16

    pytest.importorskip("torch")
    written: dict = {}
    exec(test, written)
    for case, grid in (p.values for p in connector_testing.on_grids(written["CASES"])):
        if grid != (32, 32):
            written["test_parity"](case, grid)
    assert "connector_torch" in sys.modules
