"""LDPv2, MobileVLM V2's projector: MLP, adaptive average pooling, depthwise convolution with residual.

Source: Meituan-AutoML/MobileVLM `mobilevlm/model/vision_projector.py` (LDPNetV2Projector), where the pooled
grid is always 12x12.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures
from mllm_jax.connectors.grids import pool_grid, pooled_side
from mllm_jax.connectors.layers import conv, project


class LDPv2(Connector):
    """`mlp2x_gelu`, pooling to sqrt(M) x sqrt(M), then x + depthwise 3x3 convolution of x.

    Attributes:
      tokens: M, a perfect square.
    """

    tokens: int = 144

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        side = pooled_side(self.tokens, grid, "ldpv2.tokens")
        return side, side

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        pooled_side(self.tokens, grid, "ldpv2.tokens")
        return self.tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        side = pooled_side(self.tokens, features.grid, "ldpv2.tokens")
        x = pool_grid(project(self, self.selected(features)), features.grid, (side, side))
        x = x.reshape(x.shape[0], side, side, self.width)
        x = x + conv(self, x, self.width, "peg", depthwise=True)
        return x.reshape(x.shape[0], self.tokens, self.width)
