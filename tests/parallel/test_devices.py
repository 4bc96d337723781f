"""One, two, four and eight devices and any accumulation give the same loss and gradients."""

import json
import math
import pathlib

import pytest
import tiny

SCRIPT = pathlib.Path(__file__).parent / "eight_devices.py"


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(run_script):
    """Beside `test_every_mesh`: with other backends of attention, adapters on int8 and a gated tower."""
    done = run_script(SCRIPT, **tiny.fake_devices(8))
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    losses_and_gradients(outcome["results"])
    attention_of_packed_rows(outcome["attention"])
    adapters_with_dropout_on_int8(outcome["lora"])
    gated_tower(outcome["gated"])
    # Image slots before encoder and connector and behind them, embeddings and scanned block of tower and LLM,
    # the head, and what its loss is made of: hidden states, targets and weights.
    assert outcome["constraints"] == 10
    assert outcome["constraints_without_rules"] == 0


def losses_and_gradients(results):
    assert {math.prod(result["mesh"]) for result in results} == {1, 2, 4, 8}
    assert {result["accumulation"] for result in results} == {1, 4}
    assert {result["attention"] for result in results} == {"xla", "blockwise", "splash"}
    for axis in range(4):
        assert any(result["mesh"][axis] > 1 for result in results)
    for result in results:
        assert result["total"] == results[0]["total"]
        assert result["loss_difference"] <= 1e-5, result
        assert result["gradient_difference"] <= 1e-5, result
        assert result["largest"] > 1e-2  # so that agreeing to 1e-5 says something
        assert not result["silent"], "a trained parameter without gradient"
    assert 3 < results[0]["loss"] < 20


def attention_of_packed_rows(found):
    assert len(found) == 3 * 2 * 2
    assert max(found.values()) <= 1e-5, found


def adapters_with_dropout_on_int8(found):
    assert found["loss_difference"] <= 1e-5
    assert found["gradient_difference"] <= 1e-5
    assert found["largest"] > 1e-2
    assert found["effect_of_dropout"] > 1e-3  # so that something was dropped


def gated_tower(found):
    assert found["loss_difference"] <= 1e-5
    assert found["gradient_difference"] <= 3e-6
    assert found["largest"] > 1e-3  # of the tower's fc1, which gets less than the LLM
