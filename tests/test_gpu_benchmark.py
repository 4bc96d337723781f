"""benchmarks/gpu.py runs from end to end at small shapes, with nothing but the packages of a GPU machine."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mllm_jax.models import attention

ROOT = pathlib.Path(__file__).parents[1]
# What the GPU machines that it was written for do not have.
ABSENT = ("grain", "tensorflow_datasets", "array_record", "tensorboardX", "rapidfuzz", "openpyxl", "beartype")


@pytest.mark.slow
def test_the_gpu_script_runs_at_small_shapes(tmp_path, script_environment):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in ABSENT)]
    (blocked / "sitecustomize.py").write_text("\n".join(lines))
    environment = {**script_environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{blocked}"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), f"--out={tmp_path / 'out'}", "--tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, done.stderr + log
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    sides = {"ours": {"peak", "parity", "pretrain", "finetune", "decode"}}
    if importlib.util.find_spec("torch"):
        sides["torch"] = {"pretrain", "finetune", "decode"}
    for side, sections in sides.items():
        found = [r for r in results if r["side"] == side]
        assert {r["section"] for r in found if "failed" not in r} == sections, log
        trained = [r for r in found if r["section"] in ("pretrain", "finetune")]
        assert all(r["tokens_per_second"] > 0 and r["model_flops"] > 0 for r in trained)
    backends = {r["backend"]: r for r in results if r["section"] == "parity"}
    assert backends.keys() == attention.BACKENDS.keys()
    assert all(r["right"] for r in backends.values() if "unavailable" not in r)
    assert "right" in backends["xla"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| pretrain, ours | 2 | 2 x 128 |" in table
    assert "| ours | 2 |" in table
