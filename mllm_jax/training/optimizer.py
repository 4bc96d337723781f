"""AdamW with a learning rate per parameter path, as the recipes use it (recipes.md 1.1, 1.2)."""

import math
import re
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mllm_jax.models.paths import path_of


def unit_schedule(kind: str, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Share of the peak rate at 0-based step s.

    Linear warm-up s / W over W = ceil(ratio * steps) updates, then 0.5 (1 + cos(pi (s - W) / (steps - W))), or
    constant.
    """
    warmup = math.ceil(warmup_ratio * steps)
    after = (
        optax.cosine_decay_schedule(1.0, max(steps - warmup, 1))
        if kind == "cosine"
        else optax.constant_schedule(1.0)
    )
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])


def peak_rates(params: Any, base: float, groups: tuple[tuple[str, float], ...]) -> Any:
    """The peak learning rate of every leaf: the first group whose regex fully matches its path, else `base`.

    Raises:
      ValueError: a group matches no trained parameter.
    """
    used: set[str] = set()

    def rate(path: str) -> float:
        for pattern, value in groups:
            if re.fullmatch(pattern, path):
                used.add(pattern)
                return float(value)
        return float(base)

    rates = jax.tree_util.tree_map_with_path(lambda path, _: rate(path_of(path)), params)
    for pattern, _ in groups:
        if pattern not in used:
            raise ValueError(
                f"learning_rates: {pattern!r} matches no trained parameter that an earlier group leaves"
            )
    return rates


def decays(path: str) -> bool:
    """Whether weight decay applies: not to biases and norm scales (recipes.md 1.2)."""
    return path.rsplit("/", 1)[-1] not in ("bias", "scale")


def make_optimizer(
    stage: ConfigDict, params: Any, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a stage for its trained parameters, and the base learning rate as a function of the step."""
    unit = unit_schedule(stage.schedule, steps, stage.warmup_ratio)
    rates = peak_rates(params, stage.learning_rate, tuple(tuple(group) for group in stage.learning_rates))
    mask = jax.tree_util.tree_map_with_path(lambda path, _: decays(path_of(path)), params)

    def scale_by_rates() -> optax.GradientTransformation:
        def update(updates, state, params=None):
            return jax.tree.map(lambda update, rate: -rate * update, updates, rates), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    optimizer = optax.chain(
        optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm else optax.identity(),
        optax.scale_by_adam(stage.b1, stage.b2, stage.eps),
        optax.add_decayed_weights(stage.weight_decay, mask),
        scale_by_rates(),
        optax.scale_by_schedule(unit),
    )
    return optimizer, lambda step: stage.learning_rate * unit(step)
