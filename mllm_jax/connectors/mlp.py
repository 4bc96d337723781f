"""MLP connectors `mlp{n}x_gelu`: a dense layer to the LLM's width, then n-1 times exact GELU and a dense layer.

Two layers are LLaVA-1.5's projector and P1's "two-layer MLP".
"""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, project


class MLP(Connector):
    """`mlp{layers}x_gelu`; keeps every patch token."""

    layers: int = 2

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        return project(self, self.selected(features), self.layers)
