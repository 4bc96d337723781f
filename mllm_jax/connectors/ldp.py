"""LDP, MobileVLM's lightweight downsample projector: MLP, then two MobileNet-V3 blocks.

Source: Meituan-AutoML/MobileVLM `mobilevlm/model/vision_projector.py` (LDPBlock) with torchvision's
`InvertedResidual` at expansion 1 and timm's LayerNormAct2d (eps 1e-5) as norm. torch's default
initialisation.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures
from mllm_jax.connectors.layers import conv, dense, layer_norm, project


def squeeze_width(channels: int) -> int:
    """Squeeze channels: a quarter, rounded to a multiple of 8 and never more than 10 % below."""
    target = channels // 4
    width = max(8, (target + 4) // 8 * 8)
    return width + 8 if width < 0.9 * target else width


class InvertedResidual(nn.Module):
    """Depthwise 3x3, LN, hard-swish; squeeze (ReLU), excite (hard-sigmoid); 1x1, LN; residual at stride 1."""

    stride: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B y x D"]:
        width = x.shape[-1]
        y = conv(self, x, width, "depthwise", stride=self.stride, depthwise=True, use_bias=False)
        y = jax.nn.hard_swish(layer_norm(self, y, "depthwise_norm"))
        gate = jnp.mean(y, axis=(1, 2), keepdims=True)
        gate = jax.nn.relu(dense(self, gate, squeeze_width(width), "squeeze"))
        y = y * jax.nn.hard_sigmoid(dense(self, gate, width, "excite"))
        y = layer_norm(self, dense(self, y, width, "pointwise", use_bias=False), "pointwise_norm")
        return x + y if self.stride == 1 else y


class LDP(Connector):
    """`mlp2x_gelu`, a block of stride 1, one of stride 2: a quarter of the tokens, odd sides rounded up."""

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        return -(-grid[0] // 2), -(-grid[1] // 2)

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        return -(-grid[0] // 2) * -(-grid[1] // 2)

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        x = project(self, self.selected(features))
        x = x.reshape(x.shape[0], *features.grid, self.width)
        for i, stride in enumerate((1, 2)):
            x = InvertedResidual(stride, self.dtype, self.param_dtype, name=f"block_{i}")(x)
        return x.reshape(x.shape[0], -1, self.width)
