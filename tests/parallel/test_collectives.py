"""Tensor parallelism costs sums only: no head is split, so nothing of attention is moved between devices.

Context parallelism moves queries, keys, values and outputs, and nothing else.
"""

import json
import pathlib
import re

import pytest
import tiny

pytestmark = pytest.mark.slow  # one script of 40 s for all

SCRIPT = pathlib.Path(__file__).parent / "collectives.py"
MOVES = ("all-to-all", "collective-permute", "all-gather", "reduce-scatter")


@pytest.fixture(scope="module")
def outcome(run_script):
    done = run_script(SCRIPT, **tiny.fake_devices(8))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_blocks_are_summed_and_nothing_is_moved(outcome):
    expected = {f"llm {heads} tensor={tensor}" for heads in ("32/32", "28/4", "8/2") for tensor in (2, 4, 8)}
    expected |= {f"vision {heads} tensor={tensor}" for heads in (32, 28) for tensor in (2, 4, 8)}
    assert {name for name in outcome if not re.search("gated|sequence|head", name)} == expected
    for name in expected:
        found = outcome[name]
        assert not any(found[kind] for kind in MOVES), (name, found)
        # Two sums a block in either direction, in a scan; where 28 heads are whole on 8 devices, only the MLP's.
        assert found["all-reduce"] == (2 if "28" in name and "=8" in name else 4), (name, found)


def test_devices_that_share_rows_trade_positions_for_heads(outcome):
    names = [f"llm {heads} sequence={devices}" for heads in ("32/32", "28/4", "8/2") for devices in (2, 4)]
    for name in names:
        found = outcome[name]
        # Queries, keys, values and outputs once in either direction; of weights only the gradients are summed.
        assert found["all-to-all"] == 8, (name, found)
        assert not found["all-gather"] + found["collective-permute"] + found["reduce-scatter"], (name, found)


def test_a_gated_tower_is_summed_too(outcome):
    """DINOv2-giant, whose fc1 is two halves in one matrix: as other towers, but for the gradient of that matrix."""
    for tensor in (2, 4, 8):
        found = outcome[f"gated forward tensor={tensor}"]
        assert not any(found[kind] for kind in MOVES), (tensor, found)
        assert found["all-reduce"] == 2, (tensor, found)
        found = outcome[f"gated tensor={tensor}"]
        assert not found["all-to-all"] + found["collective-permute"], (tensor, found)
        assert found["all-gather"] <= 2, (tensor, found)  # of the gradients of fc1's kernel and bias


def test_the_heads_gradient_is_cut_before_it_is_added_up_over_data(outcome):
    """Between slices, whose network is slow, each chip then sends only its part."""
    part = ["f32[8,4]"]
    assert outcome["head"] == {kind: part if "reduce" in kind else [] for kind in (*MOVES, "all-reduce")}
