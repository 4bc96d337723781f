"""AdamW with a learning rate per parameter path, as the recipes use it (recipes.md 1.1, 1.2), and Muon.

Muon orthogonalises the update of every weight matrix inside the blocks and of the connector's, and leaves all else to
Adam (with Nesterov's momentum, as Muon itself). On models as small
as the shipped ones it needs far fewer steps than AdamW.
"""

import math
import re
from typing import Any

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers

from mllm_jax.models.paths import path_of


def unit_schedule(kind: str, steps: int, warmup_ratio: float) -> optax.Schedule:
    """Share of the peak rate at 0-based step s.

    Linear warm-up s / W over W = ceil(ratio * steps) steps, then 0.5 (1 + cos(pi (s - W) / (steps - W))), or
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


def peak_rates(
    params: Any,
    base: float,
    groups: tuple[tuple[str, float], ...],
    matrices: float | None = None,
    connector_scale: float = 1.0,
) -> Any:
    """The peak learning rate of every leaf: the first group whose regex fully matches its path, else `base`.

    With Muon, block matrices that no group names take `matrices` instead. The rates of the connector's parameters are
    then multiplied by `connector_scale`.

    Raises:
      ValueError: a group matches no trained parameter.
    """
    used: set[str] = set()

    def rate(path: str, leaf: Any) -> float:
        for pattern, value in groups:
            if re.fullmatch(pattern, path):
                used.add(pattern)
                return float(value)
        return float(base if matrices is None or matrix_axes(path, leaf) is None else matrices)

    def scaled(path: str, leaf: Any) -> float:
        return rate(path, leaf) * (connector_scale if path.startswith("connector/") else 1.0)

    rates = jax.tree_util.tree_map_with_path(lambda path, leaf: scaled(path_of(path), leaf), params)
    for pattern, _ in groups:
        if pattern not in used:
            raise ValueError(
                f"learning_rates: {pattern!r} matches no trained parameter that an earlier group leaves"
            )
    return rates


def matrix_axes(path: str, leaf: Any) -> MuonDimensionNumbers | None:
    """The (input, output) axes of what Muon takes: kernels of stacked blocks, [L, in, out], and dense kernels of a
    connector, [in, out]. None is left to Adam: embeddings, heads, convolutions, norms and biases."""
    if path.endswith("/kernel"):
        if leaf.ndim == 3 and "/blocks/" in f"/{path}":
            return MuonDimensionNumbers(1, 2)
        if leaf.ndim == 2 and path.startswith("connector/"):
            return MuonDimensionNumbers(0, 1)
    return None


def muon_dimensions(params: Any) -> Any:
    """`matrix_axes` of every leaf, as `optax.contrib.muon` wants them."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: matrix_axes(path_of(path), leaf), params)


def decays(path: str) -> bool:
    """Whether weight decay applies: not to biases and norm scales (recipes.md 1.2), as in `head_bias`, `norm_scale`."""
    return not path.endswith(("bias", "scale"))


def make_optimizer(
    stage: ConfigDict, params: Any, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a stage for its trained parameters, and the base learning rate as a function of the step."""
    unit = unit_schedule(stage.schedule, steps, stage.warmup_ratio)
    muon = stage.optimizer == "muon"
    groups = tuple(tuple(group) for group in stage.learning_rates)
    matrices = stage.matrix_learning_rate if muon else None
    rates = peak_rates(params, stage.learning_rate, groups, matrices, stage.connector_rate_scale)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: decays(path_of(path)), params)

    def scale_by_rates() -> optax.GradientTransformation:
        def update(updates, state, params=None):
            return jax.tree.map(lambda update, rate: -rate * update, updates, rates), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    optimizer = optax.chain(
        optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm else optax.identity(),
        _muon(stage) if muon else optax.scale_by_adam(stage.b1, stage.b2, stage.eps),
        optax.add_decayed_weights(stage.weight_decay, mask),
        scale_by_rates(),
        optax.scale_by_schedule(unit),
    )
    return optimizer, lambda step: stage.learning_rate * unit(step)


def _muon(stage: ConfigDict) -> optax.GradientTransformation:
    """Muon with rate 1 and the sign of a gradient, so that rates and schedule follow as they do after Adam."""
    core = optax.contrib.muon(
        1.0,
        eps=stage.eps,
        adam_b1=stage.b1,
        adam_b2=stage.b2,
        adam_learning_rate=1.0,
        muon_weight_dimension_numbers=muon_dimensions,
    )
    return optax.chain(core, optax.scale(-1.0))
