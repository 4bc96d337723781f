"""Cases shared by the connector tests: tiny widths, values of order one, the same on every platform."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import connectors

# 224, 336 and 448 pixels at patch 14; SigLIP 384; one that is not square.
GRIDS = [(16, 16), (24, 24), (32, 32), (27, 27), (12, 20)]
FEW_GRIDS = [(27, 27), (12, 20)]
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """A connector with options, on a small encoder."""

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    width: int = 8
    depth: int = 6
    select: int = 5
    llm: int = 12

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())]).replace(" ", "")

    def vision(self, grid: tuple[int, int]) -> connectors.VisionSpec:
        return connectors.VisionSpec(self.width, self.depth, self.select, grid)

    def create(self, grid: tuple[int, int], **kwargs: Any) -> connectors.Connector:
        return connectors.create(self.name, self.vision(grid), self.llm, self.options, **kwargs)

    def states(self, grid: tuple[int, int], batch: int = 2) -> list[np.ndarray]:
        shape = (batch, grid[0] * grid[1], self.width)
        return [np.random.RandomState(k).randn(*shape).astype(np.float32) for k in range(self.depth + 1)]


def on_grids(cases: list[Case]) -> list[Any]:
    """Pairs of case and grid: a connector's first case on all grids, its other cases on a few."""
    seen: set[str] = set()
    pairs = []
    for case in cases:
        grids = FEW_GRIDS if case.name in seen else GRIDS
        seen.add(case.name)
        pairs += [pytest.param(case, grid, id=f"{case}-{grid[0]}x{grid[1]}") for grid in grids]
    return pairs


def abstract_params(connector: connectors.Connector, grid: tuple[int, int], batch: int = 1) -> dict[str, Any]:
    """Shapes of a connector's parameters; nothing is allocated."""
    spec = connector.vision
    state = jax.ShapeDtypeStruct((batch, grid[0] * grid[1], spec.width), jnp.float32)

    def init(state):
        features = connectors.collect(connector.request(), [state] * (spec.depth + 1), grid)
        return connector.init(jax.random.key(0), features)

    return jax.eval_shape(init, state).get("params", {})


def count(params: dict[str, Any]) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def parameters(connector: connectors.Connector, grid: tuple[int, int]) -> dict[str, Any]:
    """Random values for every parameter, so that no bias is zero and no scale one; same on every platform."""

    def value(path: tuple, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        noise = np.random.RandomState(zlib.crc32(name.encode())).randn(*leaf.shape)
        last = path[-1].key
        if last == "kernel":
            noise = noise / np.sqrt(np.prod(leaf.shape[:-1]))
        elif last in ("scale", "norm_scale"):
            noise = 1 + 0.2 * noise
        elif last in ("bias", "norm_bias"):
            noise = 0.2 * noise
        elif last == "references":  # some points lie outside the picture
            noise = 0.5 + 0.35 * noise
        return noise.astype(np.float32)

    return jax.tree_util.tree_map_with_path(value, abstract_params(connector, grid))


def run(
    connector: connectors.Connector, params: Any, states: list[np.ndarray], grid: tuple[int, int]
) -> np.ndarray:
    """The connector's tokens, jitted, as numpy."""

    @jax.jit
    def apply(params, states):
        features = connectors.collect(connector.request(), states, grid)
        return connector.apply({"params": params}, features)

    return np.asarray(apply(params, [jnp.asarray(s) for s in states]))
