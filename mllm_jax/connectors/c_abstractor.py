"""C-Abstractor: RegNet blocks, adaptive average pooling, RegNet blocks, MLP (Honeybee; P1 2.6).

Sources: khanrc/honeybee `honeybee/projectors/projectors.py`, `configs/model_config/c-abs.yaml`; block: timm
`timm/models/regnet.py` (Bottleneck, bottleneck ratio 1, group width 1, squeeze-excitation ratio 0.25).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.grids import check_table_grid, pool_grid, pooled_side
from mllm_jax.connectors.layers import append_tokens, conv, dense, layer_norm, position_table

STD = 0.02


class RegNetBlock(nn.Module):
    """1x1, depthwise 3x3, squeeze-excitation, 1x1; LayerNorm over channels after each; residual, SiLU.

    Attributes:
      features: output channels; when they differ from the input's, the shortcut is a 1x1 convolution and
        LayerNorm.
    """

    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w F"]:
        channels, shortcut = x.shape[-1], x
        y = dense(self, x, self.features, "conv1", use_bias=False, std=STD)
        y = jax.nn.silu(layer_norm(self, y, "norm1"))
        y = conv(self, y, self.features, "conv2", depthwise=True, use_bias=False, std=STD)
        y = jax.nn.silu(layer_norm(self, y, "norm2"))
        gate = jnp.mean(y, axis=(1, 2), keepdims=True)
        # The squeeze width follows the block's input channels, as in RegNet.
        gate = jax.nn.silu(dense(self, gate, round(0.25 * channels), "squeeze", std=STD))
        y = y * jax.nn.sigmoid(dense(self, gate, self.features, "excite", std=STD))
        y = layer_norm(self, dense(self, y, self.features, "conv3", use_bias=False, std=STD), "norm3")
        if channels != self.features:
            shortcut = dense(self, shortcut, self.features, "shortcut", use_bias=False, std=STD)
            shortcut = layer_norm(self, shortcut, "shortcut_norm")
        return jax.nn.silu(y + shortcut)


class CAbstractor(Connector):
    """`depth` blocks, pooling to sqrt(M) x sqrt(M), `depth` blocks, MLP with SiLU.

    Attributes:
      tokens: M, a perfect square (end tokens come on top).
      depth: blocks before and after pooling; 0: pooling and MLP only.
      hidden: channels of the blocks.
      mlp_depth: layers of the MLP.
      position_table: learned positions added to the patches; ties the connector to one grid.
      prenorm: LayerNorm (eps 1e-6) on the patches first.
      end_tokens: learned tokens of LLM width appended to the output.
    """

    tokens: int = 144
    depth: int = option(3, least=0)
    hidden: int = 1024
    mlp_depth: int = 2
    position_table: bool = True
    prenorm: bool = False
    end_tokens: int = 0

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        if self.end_tokens:
            return None
        side = pooled_side(self.tokens, grid, "c_abstractor.tokens")
        return side, side

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        pooled_side(self.tokens, grid, "c_abstractor.tokens")
        if self.position_table:
            check_table_grid(grid, self.vision.grid, "c_abstractor")
        return self.tokens + self.end_tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        x = self.selected(features).astype(self.dtype)
        if self.prenorm:
            x = layer_norm(self, x, "prenorm", eps=1e-6)
        if self.position_table:
            x = x + position_table(self, x)
        side = pooled_side(self.tokens, features.grid, "c_abstractor.tokens")
        x = self._stage(x, features.grid, "stage1")
        x = pool_grid(x, features.grid, (side, side))
        x = self._stage(x, (side, side), "stage2")
        for i in range(self.mlp_depth):
            x = dense(self, jax.nn.silu(x) if i else x, self.width, f"layer_{i}", std=STD)
        return append_tokens(self, x, self.end_tokens, STD)

    def _stage(self, x: Float[Array, "B N C"], grid: Grid, name: str) -> Float[Array, "B N F"]:
        batch, patches, _ = x.shape
        for i in range(self.depth):
            block = RegNetBlock(self.hidden, self.dtype, self.param_dtype, name=f"{name}_{i}")
            x = block(x.reshape(batch, *grid, -1)).reshape(batch, patches, -1)
        return x
