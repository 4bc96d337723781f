"""Q-Former: learned queries attend to each other and to the patches in a BERT-shaped stack (P1, BLIP-2).

Sources: TinyLLaVA Factory `tinyllava/model/connector/qformer.py` (variant "tlf") and LLaVA-NeXT
`llava/model/multimodal_resampler/qformer.py` (variant "next"); both carry BLIP-2's BERT with the text half
removed. P1 names its connector only "qformer", so width, depth and heads are options; the defaults are
BERT-base.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.layers import attend, dense, keep_attention, layer_norm, project

EPS = 1e-12  # BERT
STD = 0.02


class QFormerLayer(nn.Module):
    """Self-attention over queries, cross-attention to patches if `cross`, MLP; each plus LayerNorm."""

    heads: int
    mlp: int
    cross: bool
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B M E"], patches: Float[Array, "B N C"], deterministic: bool
    ) -> Float[Array, "B M E"]:
        x = self._attention(x, x, "self", deterministic)
        if self.cross:
            x = self._attention(x, patches, "cross", deterministic)
        y = dense(self, x, self.mlp, "fc1", std=STD)
        y = dense(self, jax.nn.gelu(y, approximate=False), x.shape[-1], "fc2", std=STD)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return layer_norm(self, x + y, "mlp_norm", EPS)

    def _attention(self, x: Array, keys: Array, name: str, deterministic: bool) -> Array:
        width = x.shape[-1]
        q = dense(self, x, width, f"{name}_q", std=STD)
        k, v = (dense(self, keys, width, f"{name}_{n}", std=STD) for n in ("k", "v"))
        dropout = nn.Dropout(self.dropout, deterministic=deterministic)

        def drop(weights: Array) -> Array:
            if name == "cross":
                keep_attention(self, weights)
            return dropout(weights)

        y = dense(self, attend(q, k, v, self.heads, drop), width, f"{name}_out", std=STD)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return layer_norm(self, x + y, f"{name}_norm", EPS)


class QFormer(Connector):
    """M learned queries, `depth` layers, then a projection to the LLM.

    Variant "tlf": LayerNorm without scale and bias on the queries, output Linear E -> D.
    Variant "next": LayerNorm with both, LayerNorm on the patches first, output `mlp{layers}x_gelu` E -> D
    (LLaVA-NeXT follows its Q-Former by its ordinary projector). LLaVA-NeXT's `mm_qformer_depth` sets
    `cross_every`, not the number of layers.

    Attributes:
      variant: "tlf" or "next", as above.
      tokens: M.  hidden: E.  depth: layers.  heads: attention heads.  mlp: inner width.
      cross_every: layers 0, n, 2n, ... have cross-attention.
      dropout: rate on embeddings, attention probabilities and every residual branch.
      layers: layers of the projector of variant "next".
    """

    tokens: int = 144
    variant: str = option("tlf", choices=("tlf", "next"))
    hidden: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    cross_every: int = 2
    dropout: float = option(0.1, least=0, below=1)
    layers: int = 2

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        if self.hidden % self.heads:
            raise ValueError(f"q_former.heads={self.heads} does not divide q_former.hidden={self.hidden}")
        return self.tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        patches = self.selected(features).astype(self.dtype)
        following = self.variant == "next"
        queries = self.param(
            "queries", nn.initializers.normal(STD), (self.tokens, self.hidden), self.param_dtype
        )
        x = jnp.broadcast_to(queries, (patches.shape[0], *queries.shape)).astype(self.dtype)
        if following:
            patches = layer_norm(self, patches, "patch_norm")
        x = layer_norm(self, x, "query_norm", EPS, affine=following)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        for i in range(self.depth):
            x = QFormerLayer(
                heads=self.heads,
                mlp=self.mlp,
                cross=i % self.cross_every == 0,
                dropout=self.dropout,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"block_{i}",
            )(x, patches, deterministic)
        return project(self, x, self.layers if following else 1)
