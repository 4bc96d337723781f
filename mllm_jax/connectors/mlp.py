"""MLP connectors `mlp{n}x_gelu`: a dense layer to the LLM's width, then n-1 times [exact GELU, dense layer].

Two layers are LLaVA-1.5's projector and P1's "two-layer MLP".
"""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import VisionFeatures
from mllm_jax.connectors.layers import project
from mllm_jax.connectors.preserving import PreservingConnector


class MLP(PreservingConnector):
    """`mlp{layers}x_gelu`; keeps every patch token."""

    layers: int = 2

    @nn.compact
    def tokens(self, features: VisionFeatures) -> Float[Array, "B N D"]:
        return project(self, self.selected(features), self.layers)
