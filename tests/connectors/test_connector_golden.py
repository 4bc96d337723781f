"""Numbers of the torch oracles, kept, so that parity is checked where torch is not installed (`make_golden.py`)."""

import json
import pathlib

import numpy as np
import pytest
from connector_testing import TOLERANCE, Case, parameters, run

from mllm_jax import connectors

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())


@pytest.mark.parametrize("record", GOLDEN, ids=lambda r: str(Case(r["name"], r["options"])))
def test_golden(record):
    case = Case(record["name"], record["options"], record["width"], llm=record["llm"])
    grid = tuple(record["grid"])
    connector = case.create(grid)
    out = run(connector, parameters(connector, grid), case.states(grid), grid)
    assert list(out.shape) == record["shape"]
    np.testing.assert_allclose(out[:, :: record["step"], :3], record["values"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out.mean((0, 1)), record["mean"], rtol=0, atol=TOLERANCE)


def test_golden_has_every_connector():
    assert {r["name"] for r in GOLDEN} == set(connectors.CONNECTORS)
