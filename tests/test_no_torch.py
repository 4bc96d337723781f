"""Programs keep an installed PyTorch from being imported; scipy and scikit-learn still work in them."""

import subprocess
import sys

import pytest

CORRELATION = """
from mllm_jax.evaluation.benchmarks.q_bench_a3 import correlations
assert correlations([(1, 2), (2, 3), (3, 5)])[0] == 1
"""
PROBE = """
from mllm_jax.cli.main import main
try:
    main(["probe", "--vision=/nowhere", "--pictures=1"])
except Exception as error:
    assert "/nowhere" in str(error), error
"""


@pytest.mark.parametrize("use", [CORRELATION, PROBE], ids=["correlation", "probe"])
def test_scipy_works_behind_the_block(use):
    code = f"from mllm_jax import no_torch\nno_torch.block()\n{use}\nimport sys\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_block_leaves_an_imported_torch_alone_and_can_be_taken_back(monkeypatch):
    from mllm_jax import no_torch

    monkeypatch.setitem(sys.modules, "torch", sys)
    no_torch.block()
    no_torch.unblock()
    assert sys.modules["torch"] is sys
    monkeypatch.setitem(sys.modules, "torch", None)
    no_torch.unblock()
    assert "torch" not in sys.modules
