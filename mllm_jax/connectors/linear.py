"""Linear connector: one dense layer from the encoder's width to the LLM's (P1 2.2; LLaVA)."""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, project


class Linear(Connector):
    """`x = F W + b`; keeps every patch token."""

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        return project(self, self.selected(features), layers=1)
