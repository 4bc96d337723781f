"""The loop over phases, on a model of one number."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mllm_jax.mini.foundation.fitting import Phase, fit

CONFIG = ConfigDict(
    {
        "optimizer": "adamw",
        "learning_rate": 0.1,
        "b2": 0.98,
        "weight_decay": 0.0,
        "log_every": 2,
        "save_every": 4,
    }
)


def _loss(params, batch):
    error = params["x"] - batch["target"]
    return (error**2).sum(), {"loss": (error**2).sum(), "near": -jnp.abs(error).sum()}


def _batches(target, start):
    """Targets that differ from step to step, the same ones wherever a run starts."""
    return ({"target": np.float32([target + 0.01 * (step % 3)])} for step in itertools.count(start))


def _phases(last):
    return [
        Phase(100, ((0, 1),), lambda start: _batches(1.0, start), until=("near", -0.2)),
        Phase(last, ((0, 1), (last, 0)), lambda start: _batches(-1.0, start)),
    ]


def _lines(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "steps_per_second"} for record in records]


def test_a_phase_ends_by_its_metric_and_a_resumed_run_is_one_in_a_piece(tmp_path):

    def run(phases, name):
        return fit("x", _loss, {"x": jnp.zeros(1)}, phases, CONFIG, tmp_path / name)

    whole = run(_phases(7), "whole")
    lines = _lines(tmp_path / "whole")
    first = [line for line in lines if line["phase"] == 0]
    assert first[-1]["near"] >= -0.2
    assert all(line["near"] < -0.2 for line in first[:-1])
    assert lines[-1]["step"] == first[-1]["step"] + 7

    def broken(start):
        for step, batch in zip(itertools.count(start), _batches(-1.0, start), strict=False):
            if step == 5:
                raise RuntimeError("cut")
            yield batch

    phases = _phases(7)
    with pytest.raises(RuntimeError, match="cut"):
        run([phases[0], Phase(7, phases[1].rates, broken)], "cut")
    kept = len(_lines(tmp_path / "cut"))
    for _ in range(2):  # the second time there is nothing left to do
        resumed = run(phases, "cut")
    again = _lines(tmp_path / "cut")[kept:]
    assert 0 < len(again) < len(lines)
    np.testing.assert_array_equal(jax.device_get(resumed["x"]), jax.device_get(whole["x"]))
    assert again == lines[-len(again) :]


def test_rates_are_straight_lines_between_their_points():
    phase = Phase(10, ((0, 0), (4, 1), (10, 0.5)), lambda start: iter(()))
    assert [float(phase.rate(step)) for step in (0, 2, 4, 7, 10, 12)] == [0, 0.5, 1, 0.75, 0.5, 0.5]


def test_checkpoints_fall_on_logged_steps(tmp_path):
    config = CONFIG.copy_and_resolve_references()
    config.save_every = 3
    with pytest.raises(ValueError, match="save_every=3 is no multiple of log_every=2"):
        fit("x", _loss, {"x": jnp.zeros(1)}, _phases(7), config, tmp_path)
