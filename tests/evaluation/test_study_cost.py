"""What a study's cells cost at full scale: the shipped files are what the planner says today."""

import json
import pathlib

import pytest

from mllm_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("recipe", "connector"), [("preserve_or_compress", "linear"), ("dense_connector", "sti")]
)
def test_shipped_costs_are_those_of_the_planner(tmp_path, recipe, connector):
    out, command = (
        tmp_path / "cost.json",
        ["study", "cost", f"{ROOT}/configs/{recipe}.py", "--topology=v5p-64"],
    )
    assert main([*command, f"--connectors={connector}", f"--out={out}"]) == 0
    shipped = json.loads((ROOT / f"docs/study/{recipe}_cost.json").read_text())
    found = json.loads(out.read_text())
    assert {**found, "recipe": "", "cells": {}} == {**shipped, "recipe": "", "cells": {}}
    assert len(found["cells"]) > 1
    for name, cell in found["cells"].items():
        assert numbers(cell), name
        assert numbers(cell) == pytest.approx(numbers(shipped["cells"][name]), rel=1e-3), name


def test_a_connector_is_added_to_the_costs(tmp_path):
    command = ["study", "cost", f"{ROOT}/configs/preserve_or_compress.py", "--topology=v5p-64"]
    out = tmp_path / "cost.json"
    assert main([*command, "--connectors=linear,+ldpv2", f"--out={out}"]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert {name.partition("-")[0] for name in cells} == {"linear", "ldpv2"}


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("nope", "there is no recipe nope; give a Python file"),
        ("README.md", "there is no recipe README.md"),
        ("configs/quickstart.py", "has no get_sweep; the recipe of a sweep has get_config"),
    ],
)
def test_a_recipe_without_cells(tmp_path, monkeypatch, capsys, recipe, says):
    monkeypatch.chdir(ROOT)
    assert main(["study", "cost", recipe, "--topology=v5p-64", f"--out={tmp_path / 'cost.json'}"]) == 1
    assert says in capsys.readouterr().err


def numbers(values, path=""):
    """Every number of nested dicts with the way to it."""
    if isinstance(values, dict):
        return {k: n for name, each in values.items() for k, n in numbers(each, f"{path}/{name}").items()}
    return {path: values} if isinstance(values, int | float) else {}
