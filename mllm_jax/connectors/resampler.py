"""Resampler: learned queries attend to themselves and the patches, gated MLPs between (Honeybee).

Source: khanrc/honeybee `honeybee/projectors/resamplers.py`, `configs/model_config/resampler.yaml`. The
residual of the attention is the normalised query; the patches are projected once and not updated between
layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.grids import check_table_grid
from mllm_jax.connectors.layers import (
    append_tokens,
    attend,
    dense,
    keep_attention,
    layer_norm,
    position_table,
)

STD = 0.02


class ResamplerLayer(nn.Module):
    """y = LN(q) + Attn(LN(q), [LN(q), LN(x)]); y + W2 LN(SiLU(W1 LN(y)) * W3 LN(y))."""

    heads: int
    mlp: int
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, queries: Float[Array, "B M E"], patches: Float[Array, "B N E"], deterministic: bool
    ) -> Float[Array, "B M E"]:
        width = queries.shape[-1]
        x = layer_norm(self, queries, "query_norm")
        keys = jnp.concatenate([x, layer_norm(self, patches, "patch_norm")], axis=1)
        q = dense(self, x, width, "q", std=STD)
        k, v = (dense(self, keys, width, n, std=STD) for n in ("k", "v"))
        dropout = nn.Dropout(self.dropout, deterministic=deterministic)

        def drop(weights: Array) -> Array:
            keep_attention(self, weights[..., x.shape[1] :])
            return dropout(weights)

        x = x + dense(self, attend(q, k, v, self.heads, drop), width, "out", std=STD)
        y = layer_norm(self, x, "mlp_norm")
        y = jax.nn.silu(dense(self, y, self.mlp, "w1", std=STD)) * dense(self, y, self.mlp, "w3", std=STD)
        y = layer_norm(self, y, "inner_norm", eps=1e-6)
        return x + dense(self, y, width, "w2", std=STD)


class Resampler(Connector):
    """Linear C -> E, `depth` layers on M queries, Linear E -> D.

    Honeybee starts all queries at zero: they stay identical for ever unless attention dropout parts them.
      Here they
    start as N(0, `query_std`), as BLIP-2's do; `query_std=0.0` is the original.

    Attributes:
      tokens: M.  hidden: E.  depth: layers.  heads: attention heads.  mlp: inner width.
      dropout: rate on the attention probabilities.
      query_std: standard deviation of the initial queries.
      position_table: learned positions added to the patches; ties the connector to one grid.
      end_tokens: learned tokens of LLM width appended to the output.
    """

    tokens: int = 64
    hidden: int = 1024
    depth: int = 6
    heads: int = 16
    mlp: int = 4096
    dropout: float = option(0.1, least=0, below=1)
    query_std: float = 0.02
    position_table: bool = False
    end_tokens: int = 0

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        if self.hidden % self.heads:
            raise ValueError(f"resampler.heads={self.heads} does not divide resampler.hidden={self.hidden}")
        if self.position_table:
            check_table_grid(grid, self.vision.grid, "resampler")
        return self.tokens + self.end_tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        patches = self.selected(features).astype(self.dtype)
        if self.position_table:
            patches = patches + position_table(self, patches)
        patches = dense(self, patches, self.hidden, "input", std=STD)
        init = nn.initializers.normal(self.query_std)
        queries = self.param("queries", init, (self.tokens, self.hidden), self.param_dtype)
        x = jnp.broadcast_to(queries, (patches.shape[0], *queries.shape)).astype(self.dtype)
        for i in range(self.depth):
            x = ResamplerLayer(
                heads=self.heads,
                mlp=self.mlp,
                dropout=self.dropout,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"block_{i}",
            )(x, patches, deterministic)
        x = dense(self, x, self.width, "output", std=STD)
        return append_tokens(self, x, self.end_tokens, STD)
