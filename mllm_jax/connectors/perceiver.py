"""Perceiver resampler (Flamingo): latents attend to themselves and the patches, an MLP after each attention.

Sources: TinyLLaVA Factory `tinyllava/model/connector/resampler.py` (variant "tlf") and LLaVA-NeXT
`llava/model/multimodal_resampler/perceiver.py` (variant "next"). No biases except the LayerNorms' and the
surrounding projections'.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, Grid, VisionFeatures, option
from mllm_jax.connectors.layers import attend, dense, keep_attention, layer_norm, project


class PerceiverLayer(nn.Module):
    """z + Attn(LN(z), [LN(x), LN(z)]), then z + W2 GELU(W1 LN(z))."""

    heads: int
    head_width: int
    mlp_ratio: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, latents: Float[Array, "B M E"], patches: Float[Array, "B N E"]
    ) -> Float[Array, "B M E"]:
        width, inner = latents.shape[-1], self.heads * self.head_width
        z = layer_norm(self, latents, "latent_norm")
        keys = jnp.concatenate([layer_norm(self, patches, "patch_norm"), z], axis=1)
        q = dense(self, z, inner, "q", use_bias=False)
        k, v = (dense(self, keys, inner, n, use_bias=False) for n in ("k", "v"))

        def seen(weights: Array) -> Array:
            keep_attention(self, weights[..., : patches.shape[1]])
            return weights

        latents = latents + dense(self, attend(q, k, v, self.heads, seen), width, "out", use_bias=False)
        z = layer_norm(self, latents, "mlp_norm")
        z = jax.nn.gelu(dense(self, z, self.mlp_ratio * width, "fc1", use_bias=False), approximate=False)
        return latents + dense(self, z, width, "fc2", use_bias=False)


class Perceiver(Connector):
    """M latents from N(0, 1), `depth` layers, a final LayerNorm.

    Variant "tlf": Linear C -> D on the patches first, everything at width D, no projection after.
    Variant "next": everything at width C, then `mlp{layers}x_gelu` C -> D (the ordinary projector).

    Attributes:
      tokens: M (TLF's default 128; LLaVA-NeXT's 32).
      variant: "tlf" or "next", as above.
      depth: layers.
      heads: attention heads.
      head_width: their width, independent of the model width.
      mlp_ratio: inner width of the MLP, in model widths.
      layers: layers of the projector of variant "next".
    """

    tokens: int = 128
    variant: str = option("tlf", choices=("tlf", "next"))
    depth: int = 3
    heads: int = 8
    head_width: int = 64
    mlp_ratio: int = 4
    layers: int = 2

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        return self.tokens

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        patches = self.selected(features).astype(self.dtype)
        if self.variant == "tlf":
            patches = dense(self, patches, self.width, "input")
        init = nn.initializers.normal(1.0)
        latents = self.param("latents", init, (self.tokens, patches.shape[-1]), self.param_dtype)
        x = jnp.broadcast_to(latents, (patches.shape[0], *latents.shape)).astype(self.dtype)
        for i in range(self.depth):
            x = PerceiverLayer(
                heads=self.heads,
                head_width=self.head_width,
                mlp_ratio=self.mlp_ratio,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"block_{i}",
            )(x, patches)
        x = layer_norm(self, x, "final_norm")
        return x if self.variant == "tlf" else project(self, x, self.layers)
