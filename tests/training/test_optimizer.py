"""The optimizer: the schedule's formula, and AdamW against NumPy and torch."""

import math

import jax
import numpy as np
import optax
import pytest

from mllm_jax.config import stage_config
from mllm_jax.models.paths import flatten, unflatten
from mllm_jax.training.optimizer import decays, make_optimizer, peak_rates, unit_schedule

SHAPES = {
    "connector/fc1/kernel": (6, 5),
    "connector/fc1/bias": (5,),
    "llm/blocks/q/kernel": (2, 5, 4),
    "llm/blocks/norm1/scale": (2, 5),
    "llm/embedding": (11, 5),
}
RATES = {"connector/fc1/kernel": 3e-2, "connector/fc1/bias": 3e-2, "llm/embedding": 5e-3}
BASE = 1e-2
STEPS = 7


def stage(**values):
    made = stage_config()
    made.learning_rate = BASE
    made.learning_rates = (("connector/.*", 3e-2), ("llm/embedding", 5e-3))
    made.weight_decay = 0.1
    made.warmup_ratio = 0.3
    for key, value in values.items():
        made[key] = value
    return made


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in SHAPES.items()}


def formula(step, steps, ratio):
    """recipes.md 1.2, 0-based step."""
    warmup = math.ceil(ratio * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.mark.parametrize(
    ("steps", "ratio"), [(1, 0.03), (2, 0.03), (40, 0.0), (100, 0.03), (101, 0.03), (7, 0.5)]
)
def test_schedule_is_the_formula_at_every_step(steps, ratio):
    schedule = unit_schedule("cosine", steps, ratio)
    found = [float(schedule(step)) for step in range(steps)]
    if math.ceil(ratio * steps) == steps:  # all warm-up
        expected = [step / steps for step in range(steps)]
    else:
        expected = [formula(step, steps, ratio) for step in range(steps)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_constant_schedule_warms_up_and_stays():
    schedule = unit_schedule("constant", 10, 0.2)
    assert [float(schedule(step)) for step in range(10)] == [0.0, 0.5, *[1.0] * 8]


def numpy_adamw(stage, steps):
    """AdamW in float64, written from its paper (arXiv 1711.05101, algorithm 2) and the recipe's exclusions."""
    params = {path: value.astype(np.float64) for path, value in arrays(0).items()}
    first = {path: np.zeros_like(value) for path, value in params.items()}
    second = {path: np.zeros_like(value) for path, value in params.items()}
    for step in range(steps):
        grads = {path: 3 * value.astype(np.float64) for path, value in arrays(1 + step).items()}
        norm = math.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
        if stage.clip_norm and norm > stage.clip_norm:
            grads = {path: grad * stage.clip_norm / norm for path, grad in grads.items()}
        share = formula(step, steps, stage.warmup_ratio)
        for path, grad in grads.items():
            rate = share * RATES.get(path, BASE)
            first[path] = stage.b1 * first[path] + (1 - stage.b1) * grad
            second[path] = stage.b2 * second[path] + (1 - stage.b2) * grad**2
            mean = first[path] / (1 - stage.b1 ** (step + 1))
            spread = np.sqrt(second[path] / (1 - stage.b2 ** (step + 1)))
            decay = 0.0 if path.endswith(("bias", "scale")) else stage.weight_decay
            params[path] = params[path] - rate * (mean / (spread + stage.eps) + decay * params[path])
    return params


def optax_run(stage, steps):
    params = unflatten(arrays(0))
    optimizer, _ = make_optimizer(stage, params, steps)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        grads = unflatten({path: 3 * value for path, value in arrays(1 + step).items()})
        params, state = update(params, state, grads)
    return flatten(params)


@pytest.mark.parametrize("values", [{}, {"clip_norm": 0.0, "b2": 0.95, "eps": 1e-3}])
def test_steps_equal_an_independent_computation(values):
    settings = stage(**values)
    found, expected = optax_run(settings, STEPS), numpy_adamw(settings, STEPS)
    for path in SHAPES:
        np.testing.assert_allclose(found[path], expected[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_steps_equal_torch():
    torch = pytest.importorskip("torch")
    settings = stage()
    tensors = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in arrays(0).items()}
    groups = [
        {"params": [tensor], "lr": 0.0, "weight_decay": 0.1 if decays(path) else 0.0}
        for path, tensor in tensors.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(settings.b1, settings.b2), eps=settings.eps)
    for step in range(STEPS):
        for path, value in arrays(1 + step).items():
            tensors[path].grad = torch.tensor(3 * value)
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), settings.clip_norm)
        for path, group in zip(tensors, optimizer.param_groups, strict=True):
            group["lr"] = RATES.get(path, BASE) * formula(step, STEPS, settings.warmup_ratio)
        optimizer.step()
    found = optax_run(settings, STEPS)
    for path, tensor in tensors.items():
        np.testing.assert_allclose(found[path], tensor.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=path)


def test_first_matching_group_counts_and_unused_groups_are_errors():
    params = unflatten(arrays(0))
    rates = flatten(peak_rates(params, BASE, (("llm/embedding", 1.0), ("llm/.*", 2.0))))
    assert rates["llm/embedding"] == 1.0
    assert rates["llm/blocks/q/kernel"] == 2.0
    assert rates["connector/fc1/bias"] == BASE
    with pytest.raises(ValueError, match=r"'vision/\.\*' matches no trained parameter"):
        peak_rates(params, BASE, (("vision/.*", 1.0),))
    with pytest.raises(ValueError, match="'llm/embedding' matches no trained parameter that an earlier"):
        peak_rates(params, BASE, (("llm/.*", 1.0), ("llm/embedding", 2.0)))


def test_what_decays():
    for path in (
        "a/bias",
        "llm/head_bias",
        "llm/final_norm/scale",
        "connector/q/norm_scale",
        "connector/norm_bias",
    ):
        assert not decays(path)
    for path in (
        "llm/head",
        "llm/embedding",
        "a/kernel",
        "a/lora_a",
        "connector/queries",
        "vision/blocks/scale1",
    ):
        assert decays(path)


def test_muon_orthogonalises_matrices_of_blocks_and_connector_and_leaves_the_rest_to_adam():
    settings = stage(
        optimizer="muon", matrix_learning_rate=0.5, warmup_ratio=0.0, weight_decay=0.0, clip_norm=0.0
    )
    settings.learning_rates = (("llm/embedding", 5e-3),)
    params, grads = unflatten(arrays(0)), unflatten(arrays(1))
    optimizer, _ = make_optimizer(settings, params, STEPS)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for path, update in flatten(updates).items():
        grad = flatten(grads)[path]
        if path.endswith("/kernel"):  # those of blocks are stacked
            for one, of in zip(np.atleast_3d(update.T).T, np.atleast_3d(grad.T).T, strict=True):
                left, _, right = np.linalg.svd(of, full_matrices=False)
                found = -np.asarray(one) / 0.5
                nearest = left @ right  # the nearest orthogonal one
                cosine = np.sum(found * nearest) / np.linalg.norm(found) / np.linalg.norm(nearest)
                assert cosine > 0.97, path
                values = np.linalg.svd(found, compute_uv=False)
                assert 0.6 < values.min() <= values.max() < 1.3, (path, values)
        else:  # the first step of Adam with Nesterov's momentum
            mean = settings.b1 * (1 - settings.b1) / (1 - settings.b1**2) * grad + grad
            rate = 5e-3 if path == "llm/embedding" else BASE
            expected = -rate * mean / (np.abs(grad) + settings.eps)
            np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-7, err_msg=path)
