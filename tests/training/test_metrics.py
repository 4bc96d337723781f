"""The log: window means, the check for finite values, and files that survive kills."""

import json
import math
import pathlib

import numpy as np
import pytest

from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.parallel.processes import OtherProcessError
from mllm_jax.training import metrics
from mllm_jax.training.flops import StepFlops
from mllm_jax.training.metrics import NonFiniteLoss, RunLog


def update(loss=1.0, labels=10.0, finite=1.0, **values):
    """Metrics of one update as the train step returns them."""
    metrics = {"loss": loss, "loss_weight": labels, "label_tokens": labels, "tokens": 30.0, "positions": 40.0,
               "grad_norm": 2.0, "grad_norm/llm": 2.0, "finite": finite} | values  # fmt: skip
    return {key: np.float32(value) for key, value in metrics.items()}


@pytest.fixture
def log(tmp_path):
    made = RunLog(tmp_path, "pretrain", 8, 0)
    yield made
    made.close()


def test_windows_are_weighted_by_supervised_tokens(log, tmp_path):
    log.add(1, update(loss=1.0, labels=30), ["a", "b"], [])
    log.add(2, update(loss=5.0, labels=10, grad_norm=4.0), ["c", ""], ["sample 'x': too long"])
    record = log.flush(1e-3)
    assert record["loss"] == pytest.approx(2.0)
    assert record["grad_norm"] == 3.0
    assert record["grad_norm/llm"] == 2.0
    assert record["padding_share"] == pytest.approx(0.25)
    assert (record["stage"], record["step"], record["skipped"]) == ("pretrain", 2, 1)
    assert record["tokens_per_second"] > 0
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record
    assert log.loss_since_checkpoint() == pytest.approx(2.0)
    assert log.loss_since_checkpoint() == math.inf


def test_model_flops_and_mfu_of_what_the_batches_held(tmp_path):
    flops = StepFlops(token=3, pair=2, label=5, image=7, forward={})
    log = RunLog(tmp_path, "pretrain", 8, 0, flops=flops, peak=1000.0)
    step = update(tokens=100, attention_pairs=10, label_tokens=1, images=2)
    log.add(1, step, ["a"], [])
    log.add(2, step, ["b"], [])
    record = log.flush(1e-3)
    log.close()
    assert record["model_flops_per_second"] * record["step_seconds"] == pytest.approx(300 + 20 + 5 + 14)
    assert record["mfu"] == record["model_flops_per_second"] / 1000


def test_a_pause_takes_nothing_from_the_steps_around_it(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    log = RunLog(tmp_path, "pretrain", 8, 0)
    with log.paused():  # compiles, and begins a trace
        now[0] += 60
        with log.paused():
            now[0] += 10
    for step in (1, 2, 3, 4):
        now[0] += 2
        log.add(step, update(), ["a"], [])
        if step == 2:
            with log.paused():  # ends the trace
                now[0] += 30
    record = log.flush(1e-3)
    assert (record["step_seconds"], record["tokens_per_second"]) == (2, 15)
    log.close()


def test_means_follow_the_weights_and_counts_do_not(log):
    """As with `loss_weighting=sample`, where a sample of many tokens weighs no more than one of few."""
    log.add(1, update(loss=1.0, labels=300, loss_weight=1.0), ["a"], [])
    log.add(2, update(loss=4.0, labels=10, loss_weight=2.0), ["b"], [])
    record = log.flush(1e-3)
    assert record["loss"] == pytest.approx(3.0)
    assert record["label_tokens"] == 310
    assert log.loss_since_checkpoint() == pytest.approx(3.0)


def test_what_cannot_be_written_ends_every_process(as_processes, tmp_path):
    def work(index):
        log = RunLog(tmp_path, "pretrain", 4, 0, write=index == 0)
        try:
            log.add(1, update(), ["a"], [])
            if index == 0:
                (tmp_path / "metrics.jsonl").mkdir()
            log.flush(1e-3)
        finally:
            log.close()

    first, second = as_processes(work)
    assert isinstance(first, OSError)
    assert isinstance(second, OtherProcessError)


def test_steps_without_supervised_tokens_do_not_count_as_good(log):
    log.add(1, update(loss=3.0), ["a"], [])
    log.add(2, update(loss=0.0, labels=0.0), [""], [])
    assert log.flush(1e-3)["loss"] == pytest.approx(3.0)
    assert log.loss_since_checkpoint() == pytest.approx(3.0)


@pytest.mark.parametrize(
    "bad", [{"loss": math.nan}, {"loss": math.inf}, {"finite": 0.0, "grad_norm": math.nan}]
)
def test_the_first_step_that_is_not_finite_is_named_with_its_samples(log, tmp_path, bad):
    log.add(1, update(), ["good"], [])
    log.add(2, update(**bad), ["bad1", "", "bad2"], [])
    log.add(3, update(loss=math.nan, finite=0.0), ["later"], [])
    with pytest.raises(NonFiniteLoss, match=r"'pretrain'.* at step 2; its samples: bad1, bad2\. Look"):
        log.flush(1e-3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_tensorboard_events_hold_the_curves(log, tmp_path):
    log.add(1, update(), ["a"], [])
    log.flush(1e-3)
    log.close()
    (events,) = (tmp_path / "tensorboard" / "pretrain").iterdir()
    assert b"pretrain/loss" in events.read_bytes()
    assert b"pretrain/grad_norm/llm" in events.read_bytes()


def test_readers_take_the_last_record_of_a_repeated_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for start, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):  # killed after 3, continued after 1
        log = RunLog(tmp_path, "finetune", 4, start)
        for step in steps:
            log.add(step, update(loss=10 * start + step), ["a"], [])
            log.flush(1e-3)
        log.close()
    assert len(path.read_text().splitlines()) == 6  # nothing is deleted
    assert [(r["step"], r["loss"]) for r in read_metrics(path)["finetune"]] == [
        (1, 1),
        (2, 12),
        (3, 13),
        (4, 14),
    ]


def test_a_torn_line_loses_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = '{"stage": "pretrain", "step": 1, "loss": 3.0}\n'
    path.write_text(first + '{"stage": "pretrain", "st')
    log = RunLog(tmp_path, "pretrain", 4, 1)
    log.add(2, update(loss=2.0), ["a"], [])
    log.flush(1e-3)
    log.close()
    assert path.read_text().startswith(first)
    assert len(path.read_text().splitlines()) == 2
    assert [(record["step"], record["loss"]) for record in read_metrics(path)["pretrain"]] == [
        (1, 3.0),
        (2, 2.0),
    ]


def test_only_the_first_process_writes(tmp_path):
    log = RunLog(tmp_path, "pretrain", 4, 0, write=False)
    log.add(1, update(), ["a"], [])
    assert log.flush(1e-3)["loss"] == 1.0
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_count_stop_and_sample_parameters_together(tmp_path, run_two_processes):
    script = pathlib.Path(__file__).parent / "two_processes.py"
    said = run_two_processes(script, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped"] for record in records] == [2 + 3, 2 + 3 + 1]
    failures = []
    for index, lines in enumerate(said):
        failed, shared, wishes, same, found = lines[-5:]
        failures.append(failed)
        assert shared == f"[0, 1, {index == 0}] (3, 4) {sum(n * n for n in range(12))}"
        assert wishes == "[True, False, False, True]"  # that of one is everyone's, at the agreed points only
        assert same == "[True, False]"
        # Parameters split along either axis are sampled as in one process: every third element, and all of 40.
        sampled = [[199_986, 199_989, 199_992, 199_995, 199_998], [35, 36, 37, 38, 39]]
        assert json.loads(found) == [[[4, 25_000], [2, 10]], sampled]
    assert failures == ["OtherProcessError", "OSError"]
