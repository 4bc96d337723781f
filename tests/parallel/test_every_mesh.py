"""Every mesh of 8 devices gives the same loss and gradients, with packed rows and without."""

import itertools
import json
import math
import pathlib

import pytest
import tiny

SCRIPT = pathlib.Path(__file__).parent / "every_mesh.py"
# Sizes of data, fsdp, sequence and tensor.
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
ALWAYS = [(1, 2, 2, 2)]
OTHERS = [sizes for sizes in MESHES if sizes not in ALWAYS]


def check(run_script, meshes):
    names = ["x".join(map(str, sizes)) for sizes in meshes]
    done = run_script(SCRIPT, *names, **tiny.fake_devices(8))
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["mesh"] for result in results] == names
    for result in results:
        assert result["loss_difference"] <= 1e-5, result
        assert result["gradient_difference"] <= 1e-5, result
        assert result["largest"] > 1e-2  # so that agreeing to 1e-5 says something
        assert not result["silent"], "a parameter without gradient"
        assert all(3 < loss < 20 for loss in result["loss"])
        assert len(set(result["loss"])) == len(result["loss"]) == result["batches"]


def test_meshes_of_all_axes_agree(run_script):
    check(run_script, ALWAYS)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_meshes_of_eight_agree(part, run_script):
    assert len(MESHES) == 20
    check(run_script, OTHERS[part::4])
