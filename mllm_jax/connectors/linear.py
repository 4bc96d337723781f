"""Linear connector: one dense layer from the encoder's width to the LLM's (P1 2.2; LLaVA)."""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import VisionFeatures
from mllm_jax.connectors.layers import project
from mllm_jax.connectors.preserving import PreservingConnector


class Linear(PreservingConnector):
    """`x = F W + b`; keeps every patch token."""

    @nn.compact
    def tokens(self, features: VisionFeatures) -> Float[Array, "B N D"]:
        return project(self, self.selected(features), layers=1)
