"""One update: what it trains, what it leaves alone, how it accumulates, and what stops it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax.config import stage_config
from mllm_jax.interop.saved_params import CheckpointError
from mllm_jax.models import mllm, paths
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.parallel.mesh import batch_shardings, make_mesh, use_mesh
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training import step as training_step
from mllm_jax.training.checkpoint import StageCheckpoints
from mllm_jax.training.optimizer import make_optimizer
from mllm_jax.training.params import place
from mllm_jax.training.step import (
    init_state,
    loss_and_grads,
    make_train_step,
    state_shardings,
    to_device,
    with_shardings,
)

LENGTH = 16
ROWS = [tiny.Row(1, 9, 5), tiny.Row(0, 12, 1), tiny.Row(2, 6, 2), tiny.Row(1, 4, 0)]
TRAINABLE = ("connector/.*", "llm/.*")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def trainer(tiny_model, tiny_params, mesh):
    """(step function, function that makes a fresh state, frozen parameters): bf16 tower, clipping, two rates."""
    stage = stage_config()
    stage.learning_rate, stage.learning_rates = 1e-2, (("connector/.*", 2e-2),)
    stage.warmup_ratio = 0.0
    trained, frozen = paths.split(tiny_params, TRAINABLE)
    optimizer, _ = make_optimizer(stage, trained, 10)
    frozen = place(frozen, mesh, "bfloat16", tiny_model)

    def fresh(**replace):
        params = paths.unflatten(paths.flatten(trained) | replace)
        return init_state(place(params, mesh, "float32", tiny_model), optimizer)

    state = fresh()
    step = make_train_step(
        tiny_model,
        optimizer,
        with_shardings(state, state_shardings(state, mesh, tiny_model)),
        frozen,
        to_device(tiny.make_batch(tiny_model, ROWS, LENGTH), mesh),
        label_tokens=8,
        accumulation=2,
        seed=0,
    )
    return step, fresh, frozen


@pytest.mark.slow
def test_blocks_that_are_written_out_compute_the_same(trainer, tiny_model, mesh, monkeypatch):
    _, fresh, frozen = trainer
    batch = to_device(tiny.make_batch(tiny_model, ROWS, LENGTH), mesh)
    monkeypatch.setattr(training_step, "UNROLLED_FROM", 1)
    stage = stage_config()
    state = fresh()
    optimizer, _ = make_optimizer(stage, state.params, 10)
    given = (with_shardings(state, state_shardings(state, mesh, tiny_model)), frozen, batch)
    results, loops = [], []
    for depth in (0, tiny_model.llm.depth):
        monkeypatch.setattr(training_step, "UNROLLED_DEPTH", depth)
        made = make_train_step(tiny_model, optimizer, *given, label_tokens=8, accumulation=1, seed=0)
        loops.append(made.lower(*given).as_text().count("stablehlo.while"))
        results.append(made(fresh(), frozen, batch))
    assert loops[1] < loops[0]
    (looped, told), (out, told_out) = results
    np.testing.assert_allclose(told_out["loss"], told["loss"], rtol=1e-6)
    np.testing.assert_allclose(told_out["grad_norm"], told["grad_norm"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), out.params, looped.params)


@pytest.fixture(scope="module")
def params(tiny_params):
    return jax.tree.map(jnp.asarray, tiny_params)


@pytest.fixture(scope="module")
def batch(tiny_model):
    return tiny.make_batch(tiny_model, ROWS, LENGTH)


def host(tree):
    return jax.tree.map(lambda x: np.array(x), tree)


def test_trained_parameters_move_and_frozen_ones_do_not(trainer, batch, mesh, tiny_params):
    step, fresh, frozen = trainer
    state, before = fresh(), host(frozen)
    start = host(state.params)
    with use_mesh(mesh):
        for _ in range(3):
            state, metrics = step(state, frozen, to_device(batch, mesh))
    assert int(state.step) == 3
    for path, leaf in paths.flatten(state.params).items():
        assert leaf.dtype == jnp.float32
        changed = np.asarray(leaf) != paths.flatten(start)[path]
        assert changed.any(), path
    jax.tree.map(np.testing.assert_array_equal, host(frozen), before)
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert set(state.params) == {"connector", "llm"}
    assert set(frozen) == {"vision"}

    # Optimizer state of exactly the trained leaves: two moments each, and counters.
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.params))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted(shapes + shapes)

    assert all(value.dtype == jnp.float32 for value in metrics.values())
    assert float(metrics["label_tokens"]) == 8
    assert float(metrics["tokens"]) == sum(row.text + 4 * row.images for row in ROWS)
    assert float(metrics["positions"]) == len(ROWS) * LENGTH
    squares = [float(metrics[f"grad_norm/{name}"]) ** 2 for name in ("connector", "llm")]
    assert sum(squares) == pytest.approx(float(metrics["grad_norm"]) ** 2, rel=1e-5)


def test_what_is_not_a_number_is_told_and_never_saved(trainer, batch, mesh, tiny_params, tmp_path):
    step, fresh, frozen = trainer
    norm = tiny_params["llm"]["final_norm"]["scale"].copy()
    norm[3] = np.nan
    state = fresh(**{"llm/final_norm/scale": norm})
    with use_mesh(mesh):
        state, metrics = step(state, frozen, to_device(batch, mesh))
    assert float(metrics["finite"]) == 0
    assert np.isnan(float(metrics["loss"]))
    assert int(state.step) == 1
    checkpoints = StageCheckpoints(tmp_path, 2, 0)
    with pytest.raises(CheckpointError, match="holds NaN or infinity after step 1"):
        checkpoints.save(state, {}, 1.0)
    checkpoints.close()
    assert StageCheckpoints(tmp_path, 2, 0).steps() == []


def test_parameters_that_overflow_are_never_saved(trainer, batch, mesh, tmp_path):
    step, fresh, frozen = trainer
    state = fresh()
    # Weights at the edge of float32 that no supervised token reads: row 3 of the embedding of an unused token.
    unused = sorted(set(range(260)) - set(batch.tokens.ravel().tolist()))[0]
    edge = np.finfo(np.float32).max
    params = state.params
    params["llm"]["embedding"] = params["llm"]["embedding"].at[unused, 0].set(edge)
    moments = jax.tree.map(jnp.copy, state.opt_state)
    adam = moments[1]
    push = adam.mu["llm"]["embedding"].at[unused, 0].set(-edge)
    adam.mu["llm"]["embedding"] = push
    adam.nu["llm"]["embedding"] = adam.nu["llm"]["embedding"].at[unused, 0].set(1.0)
    state = state.replace(params=params, opt_state=moments)
    checkpoints = StageCheckpoints(tmp_path, 2, 0)
    checkpoints.save(state, {}, 1.0)
    with use_mesh(mesh):
        state, metrics = step(state, frozen, to_device(batch, mesh))
    assert np.isfinite(float(metrics["loss"]))
    assert np.isfinite(float(metrics["grad_norm"]))
    assert float(metrics["finite"]) == 1  # the step's own guard looks at nothing else
    with use_mesh(mesh):  # nor do later steps, because nothing reads that row
        state, metrics = step(state, frozen, to_device(batch, mesh))
    assert np.isfinite(float(metrics["loss"]))
    with pytest.raises(CheckpointError, match="params/llm/embedding holds NaN or infinity after step 2"):
        checkpoints.save(state, {}, 1.0)
    checkpoints.close()
    assert StageCheckpoints(tmp_path, 2, 0).steps() == [0]


def test_no_second_state_exists_beside_the_donated_one(mesh):
    """AdamW's temporaries are the gradient and the clipped gradient; a chosen state would be another one or two."""
    llm = DecoderConfig(2048, 256, 2, heads=4, kv_heads=2, head_width=64, mlp_width=1024)
    model = dataclasses.replace(tiny.model_config(), llm=llm, remat="full")
    trained, frozen = paths.split(mllm.abstract_params(model), TRAINABLE)
    optimizer, _ = make_optimizer(stage_config(), trained, 10)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), trained)
    rows = tiny.make_batch(model, [tiny.Row(1, 4, 2)] * 2, LENGTH)
    arguments = (
        with_shardings(state, state_shardings(state, mesh, model)),
        with_shardings(frozen, param_shardings(frozen, mesh, model)),
        with_shardings(rows, batch_shardings(rows, mesh)),
    )

    step = make_train_step(model, optimizer, *arguments, label_tokens=8, accumulation=1, seed=0)
    with use_mesh(mesh):
        temporaries = step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    trained_bytes = 4 * paths.count(trained)
    assert trained_bytes < temporaries < 2.2 * trained_bytes


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_keeps_every_dtype_of_the_state(
    optimizer, dtype, accumulation, tiny_model, tiny_params, batch, mesh
):
    """Else a run that was resumed, whose state has the dtypes from before the first step, would go on otherwise."""
    stage = stage_config()
    stage.optimizer, stage.clip_norm = optimizer, 1.0
    trained, frozen = paths.split(tiny_params, TRAINABLE)
    made, _ = make_optimizer(stage, trained, 10)
    state = init_state(place(trained, mesh, dtype, tiny_model), made)
    given = (
        with_shardings(state, state_shardings(state, mesh, tiny_model)),
        place(frozen, mesh, "bfloat16", tiny_model),
        to_device(batch, mesh),
    )
    step = make_train_step(tiny_model, made, *given, label_tokens=8, accumulation=accumulation, seed=0)
    with use_mesh(mesh):
        after, _ = jax.eval_shape(step, *given)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(dtype)}


def test_label_tokens_are_counted_whatever_they_weigh(trainer, batch, mesh):
    step, fresh, frozen = trainer
    halved = batch.replace(loss_weights=batch.loss_weights / 2)
    with use_mesh(mesh):
        _, metrics = step(fresh(), frozen, to_device(halved, mesh))
    assert float(metrics["label_tokens"]) == 8
    assert float(metrics["loss_weight"]) == 4


def test_loss_is_the_mean_over_all_tokens_not_of_micro_batch_means(tiny_model, params, batch):
    """Rows have 5, 1, 2 and 0 supervised tokens; means of means would weigh them alike."""
    trained, frozen = paths.split(params, ("connector/.*",))

    def run(rows, accumulation):
        return loss_and_grads(tiny_model, trained, frozen, rows, 8, accumulation, jax.random.key(0))

    run = jax.jit(run, static_argnums=1)
    whole = run(batch, 1)
    single = [run(jax.tree.map(lambda x, i=i: x[i : i + 1], batch), 1) for i in range(len(ROWS))]
    counts = [row.labels for row in ROWS]
    assert [float(total) for _, _, total in single] == counts
    expected = sum(float(loss) * count for (loss, _, _), count in zip(single, counts, strict=True)) / sum(
        counts
    )
    assert float(whole[0]) == pytest.approx(expected, rel=1e-5)
    means = np.mean([float(loss) for loss, _, _ in single])
    assert float(whole[0]) != pytest.approx(means, rel=1e-2)
    assert float(single[3][0]) == 0.0  # no supervised token: no loss, no gradient, no NaN
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(single[3][1]))
    accumulated = run(batch, 4)
    assert float(accumulated[0]) == pytest.approx(float(whole[0]), abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), accumulated[1], whole[1])


def test_a_pattern_that_matches_nothing_is_an_error(tiny_params):
    with pytest.raises(ValueError, match=r"pattern 'llm/block/\.\*' matches no parameter"):
        paths.split(tiny_params, ("connector/.*", "llm/block/.*"))


def test_patterns_match_whole_paths(tiny_params):
    trained, frozen = paths.split(tiny_params, (r"llm/blocks/[qv]/kernel",))
    assert set(paths.flatten(trained)) == {"llm/blocks/q/kernel", "llm/blocks/v/kernel"}
    merged = paths.merge(trained, frozen)
    assert set(paths.flatten(merged)) == set(paths.flatten(tiny_params))
    with pytest.raises(ValueError, match="'llm/blocks/q/kernel' is in two parts"):
        paths.merge(trained, tiny_params)
