"""Stages with LoRA: gradients, dropout, resuming, what is kept for evaluation, export and the next stage; int8 base."""

import dataclasses
import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from mllm_jax.cli.main import main as command
from mllm_jax.config import ConfigError, stage_config
from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.evaluation.study.latency import step_times
from mllm_jax.inference import runs
from mllm_jax.inference.load import load
from mllm_jax.interop import load_tokenizer
from mllm_jax.models import lora, paths, quantize
from mllm_jax.models.lora import LoRA
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.training import adapters, preflight
from mllm_jax.training.loss import weighted_loss
from mllm_jax.training.metrics import RunLog
from mllm_jax.training.params import load_stage, place, starting_params
from mllm_jax.training.step import loss_and_grads

BOTH = r"(llm|vision)/blocks/(q|down|fc2)/kernel"  # kernels of the LLM and of the tower
ROWS = [tiny.Row(1, 9, 5), tiny.Row(0, 12, 1), tiny.Row(2, 6, 2), tiny.Row(1, 4, 3)]
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch(tiny_model):
    return tiny.make_batch(tiny_model, ROWS, 24)


def with_adapters(params, settings):
    """Parameters with adapters whose B is not zero."""
    flat = paths.flatten(jax.device_get(lora.add(params, settings, KEY)))
    rng = np.random.default_rng(3)
    for path, leaf in flat.items():
        if path.endswith("lora_b"):
            flat[path] = (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
    return paths.unflatten(flat)


@functools.partial(jax.jit, static_argnums=0)
def _update(model, trained, frozen, batch, key):
    return loss_and_grads(model, trained, frozen, batch, 8, 1, key)


@functools.partial(jax.jit, static_argnums=0)
def _evaluation(model, params, batch):
    total, weights = weighted_loss(model, params, batch, 8)
    return total / weights


def run(model, trained, frozen, batch, key=KEY):
    """Loss and flat gradients of one update."""
    loss, grads, _ = _update(model, trained, frozen, batch, key)
    return float(loss), {path: np.asarray(leaf) for path, leaf in paths.flatten(grads).items()}


# ------------------------------------------------------------------------------------- what one update computes


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_weights_projected(tiny_model, tiny_params, batch):
    """With W' = W + s A B and G = dL/dW' of the plain model: dL/dA = s G B^T, dL/dB = s A^T G."""
    settings = LoRA(rank=3, alpha=6, dropout=0.0, targets=BOTH)
    params = with_adapters(tiny_params, settings)
    frozen, adapted = lora.split(params)
    merged = paths.flatten(tiny_params)
    for path in lora.target_paths(tiny_params, settings):
        stem, flat = path.removesuffix("kernel"), paths.flatten(adapted)
        a, b = (flat[stem + name].astype(np.float64) for name in ("lora_a", "lora_b"))
        merged[path] = (merged[path] + 2.0 * a @ b).astype(np.float32)
    full, rest = paths.split(paths.unflatten(merged), (BOTH,))
    expected_loss, whole = run(tiny_model, full, rest, batch)
    loss, grads = run(dataclasses.replace(tiny_model, lora=settings), adapted, frozen, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert len(grads) == 2 * len(whole) == 8
    for path, gradient in whole.items():
        stem = path.removesuffix("kernel")
        a, b = (paths.flatten(adapted)[stem + name].astype(np.float64) for name in ("lora_a", "lora_b"))
        for name, expected in (
            ("lora_a", 2.0 * gradient @ b.swapaxes(1, 2)),
            ("lora_b", 2.0 * a.swapaxes(1, 2) @ gradient),
        ):
            assert np.abs(expected).max() > 1e-4
            np.testing.assert_allclose(grads[stem + name], expected, atol=2e-5, err_msg=stem + name)


@pytest.mark.slow
def test_dropout_is_on_in_training_and_off_in_evaluation(tiny_model, tiny_params, batch):
    settings = LoRA(rank=3, alpha=6, dropout=0.5, targets=BOTH)
    params = with_adapters(tiny_params, settings)
    frozen, trained = lora.split(params)
    model = dataclasses.replace(tiny_model, lora=settings)
    off = dataclasses.replace(tiny_model, lora=dataclasses.replace(settings, dropout=0.0))
    without, plain = run(off, trained, frozen, batch)
    once, first = run(model, trained, frozen, batch)
    again, _ = run(model, trained, frozen, batch)
    other, _ = run(model, trained, frozen, batch, jax.random.key(1))
    assert once == again
    assert len({once, other, without}) == 3
    for path, gradient in first.items():  # in the tower as in the LLM
        assert not np.allclose(gradient, plain[path], atol=1e-6), path
    # Evaluation asks without a key, and is asked the merged model: neither drops anything.
    assert float(_evaluation(model, params, batch)) == pytest.approx(without, rel=1e-6)
    merged = lora.merge(params, settings)
    assert float(_evaluation(tiny_model, merged, batch)) == pytest.approx(without, rel=1e-5)


def test_int8_base_is_near_and_computes_as_its_widened_weights(tiny_model, tiny_params, batch):
    """What int8 costs, on random weights; docs/operating.md has it for the mini LLM."""
    stage = stage_config()
    stage.quantize_base, stage.lora.rank = "int8", 2
    trained, frozen = paths.split(tiny_params, ("connector/.*",))
    stored = adapters.quantized(stage, frozen)
    kernels = {path: leaf for path, leaf in paths.flatten(stored).items() if leaf.dtype == jnp.int8}
    assert {path.split("/")[0] for path in kernels} == {"llm"}
    assert len(kernels) == 7
    exact, gradient = run(tiny_model, trained, frozen, batch)
    rounded, near = run(tiny_model, trained, stored, batch)
    widened, same = run(tiny_model, trained, quantize.dequantize(stored, "float32"), batch)
    assert 0 < abs(rounded - exact) < 0.01 * exact
    assert rounded == pytest.approx(widened, rel=1e-5)
    for path, value in near.items():
        np.testing.assert_allclose(value, same[path], atol=1e-5)
        assert np.linalg.norm(value - gradient[path]) < 0.05 * np.linalg.norm(gradient[path]), path


def test_int8_scales_are_not_rounded_when_placed(tiny_model, tiny_params):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    stored = quantize.quantize({"llm": tiny_params["llm"]}, adapters.INT8_TARGETS)
    placed = paths.flatten(place(stored, mesh, "bfloat16", tiny_model))
    scale = placed["llm/blocks/q/kernel_scale"]
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(scale, paths.flatten(stored)["llm/blocks/q/kernel_scale"])
    assert placed["llm/blocks/q/kernel"].dtype == jnp.int8
    assert placed["llm/embedding"].dtype == jnp.bfloat16


# --------------------------------------------------------------------------------------------- through train.py


def mixed_recipe(checkpoints, data):
    """Connector in stage 1; connector and adapters on an int8 LLM in stage 2, at different rates, with dropout."""
    config = tiny.recipe(checkpoints, data)
    config.stages.pretrain.steps = 2
    stage = config.stages.finetune
    stage.trainable, stage.steps, stage.checkpoint_every = ("connector/.*",), 4, 2
    stage.lora.rank, stage.lora.alpha, stage.lora.dropout = 2, 4.0, 0.3
    stage.learning_rates = (("connector/.*", 1e-3),)
    stage.quantize_base = "int8"
    return config


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory, tiny_checkpoints, tiny_data):
    """(config, work directory, parameters that the last stage leaves)."""
    config = mixed_recipe(tiny_checkpoints, tiny_data)
    directory = tmp_path_factory.mktemp("runs") / "lora"
    return config, directory, train.train(config, directory, evaluate=False)


def same_bits(found, expected):
    found, expected = paths.flatten(found), paths.flatten(expected)
    assert set(found) == set(expected)
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), err_msg=path)


def test_the_mixed_recipe_trains_connector_and_adapters_only(finished, tiny_params):
    _, directory, params = finished
    flat, before = paths.flatten(params), paths.flatten(tiny_params)
    moved = [path for path in flat if path.endswith("lora_b") and np.asarray(flat[path]).any()]
    assert len(moved) == 7  # every linear layer of the LLM's blocks
    assert all(leaf.dtype == jnp.float32 for path, leaf in flat.items() if "lora_" in path)
    for path, leaf in before.items():
        if path.startswith("connector"):
            continue
        found = flat[path]
        if found.dtype == jnp.int8:
            found = np.asarray(found, np.float32) * np.asarray(flat[f"{path}_scale"])[..., None, :]
            assert np.abs(found - leaf).max() <= np.abs(leaf).max() / 254 * 1.01, path
        else:
            np.testing.assert_array_equal(np.asarray(found), leaf, err_msg=path)
    last = read_metrics(directory / "metrics.jsonl")["finetune"]
    assert {"grad_norm/connector", "grad_norm/llm"} <= set(last[0])


@pytest.mark.slow
def test_its_steps_are_timed_from_merged_parameters(finished):
    config, directory, _ = finished
    found = step_times(directory, load(directory))
    assert list(found) == [f"step_seconds/{name}" for name in config.stage_order]
    assert min(found.values()) > 0


@pytest.mark.slow
def test_stopped_and_resumed_is_the_unbroken_run_bit_for_bit(train, finished, tmp_path, monkeypatch):
    config, _, params = finished
    add = RunLog.add

    def stop_midway(log, step, *arguments):
        add(log, step, *arguments)
        if (log.stage, step) == ("finetune", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "add", stop_midway)
        with pytest.raises(SystemExit, match="after step 2"):
            train.train(config, tmp_path / "run", evaluate=False)
    same_bits(train.train(config, tmp_path / "run", evaluate=False), params)


def test_evaluation_gets_merged_weights_and_the_next_stage_the_adapters(finished, tiny_model, batch):
    config, directory, params = finished
    model = runs.model_config(config)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    where = directory / "params" / "finetune"
    same_bits(load_stage(where, config, model, mesh), params)
    merged = runs.merged(runs.stage_params(where, model), config.stages.finetune, config.model.frozen_dtype)
    assert not [path for path in paths.flatten(merged) if "lora" in path or path.endswith("_scale")]
    same_bits(merged, runs.merged(params, config.stages.finetune, config.model.frozen_dtype))
    settings = runs.lora_settings(config.stages.finetune)
    asked = dataclasses.replace(tiny_model, lora=settings)
    trained = float(_evaluation(asked, params, batch))
    assert float(_evaluation(tiny_model, merged, batch)) == pytest.approx(trained, rel=1e-5)


@pytest.mark.parametrize(("rank", "kept"), [(2, True), (0, False), (3, False)])
def test_the_next_stage_goes_on_from_adapters_or_merges_them(finished, tiny_params, rank, kept):
    config, _, params = finished
    config = config.copy_and_resolve_references()
    third = config.stages.finetune.copy_and_resolve_references()
    third.lora.rank, third.lora.dropout, third.quantize_base = rank, 0.0, "none"
    with config.unlocked():
        config.stages.third = third
    config.stage_order = ("pretrain", "finetune", "third")
    model = runs.model_config(config)
    start = paths.flatten(starting_params(config, model, "third", params))
    trained = paths.flatten(params)
    a, b = (np.asarray(trained[f"llm/blocks/q/{name}"]) for name in ("lora_a", "lora_b"))
    base = paths.flatten(tiny_params)["llm/blocks/q/kernel"]  # unrounded, though stage 2 kept it as int8
    np.testing.assert_array_equal(start["connector/layer_0/kernel"], trained["connector/layer_0/kernel"])
    if kept:
        np.testing.assert_array_equal(start["llm/blocks/q/lora_a"], a)
        np.testing.assert_array_equal(start["llm/blocks/q/kernel"], base)
        return
    np.testing.assert_allclose(start["llm/blocks/q/kernel"], base + 2.0 * a @ b, atol=1e-6)
    if rank:
        assert start["llm/blocks/q/lora_a"].shape == (2, 32, 3)
        assert not np.asarray(start["llm/blocks/q/lora_b"]).any()
    else:
        assert not [path for path in start if "lora" in path]


def test_int8_that_would_lose_what_was_learned_is_refused(tiny_config):
    tiny_config.stages.pretrain.trainable = ("connector/.*", "llm/blocks/q/kernel")
    middle = tiny_config.stages.finetune.copy_and_resolve_references()
    middle.trainable, middle.quantize_base, middle.accumulation = ("connector/.*",), "int8", 1
    with tiny_config.unlocked():
        tiny_config.stages.middle = middle
    tiny_config.stage_order = ("pretrain", "middle", "finetune")
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    model, tokenizer = runs.model_config(tiny_config), load_tokenizer(tiny_config.model.llm.path)
    with pytest.raises(
        ConfigError, match=r"'stages\.middle\.quantize_base' is 'int8', but 'llm/blocks/q/kernel'"
    ):
        preflight.check_stages(tiny_config, model, tokenizer, mesh)
    tiny_config.stages.pretrain.trainable = ("connector/.*",)
    preflight.check_stages(tiny_config, model, tokenizer, mesh)


def test_a_run_exports_its_adapter_and_its_merged_weights(finished, tmp_path, capsys):
    config, directory, params = finished
    assert (
        command(["export", "--from", str(directory), "--format", "adapter", "--to", str(tmp_path / "a")]) == 0
    )
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (2, 4.0, 0.3)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], np.asarray(params["llm"]["blocks"]["q"]["lora_a"])[1].T)
    assert command(["export", "--from", str(directory), "--format", "llm", "--to", str(tmp_path / "m")]) == 0
    merged = runs.merged(params, config.stages.finetune, "float32")["llm"]["blocks"]["q"]["kernel"]
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    found = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_allclose(found, np.asarray(merged)[1].T, atol=1e-6)
