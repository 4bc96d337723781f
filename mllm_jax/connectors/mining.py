"""Patch info mining: every token takes from the fine features of its own cell (Mini-Gemini; extensions.md 3).

With a query q of the token x and keys and values of the P positions of its cell,

    q = Linear(LN(x))    k, v = Linear(LN(fine))    x + softmax(q k / sqrt(C)) v

Keys and values are never made. Both are linear in the normalised fine features, so the query is taken to their A
channels instead (q k = (W_k^T q) LN(fine) + q b_k), and v of the weighted mean is the weighted mean of v. That is the
same computation with about P times fewer operations, which at 64 positions of 2880 channels were more than the
encoder's. LayerNorm, too, is applied to the sums: only its mean and deviation per position are made.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.layers import dense, layer_norm, uniform_within

EPS = 1e-5  # of the LayerNorms


class NormedLinear(nn.Module):
    """The parameters of a LayerNorm and of the linear layer behind it, for use with sums over normalised vectors."""

    features: int
    width: int
    param_dtype: Any

    @nn.compact
    def __call__(self) -> tuple[Array, Array, Array, Array]:
        """Scale and bias of the norm [A], kernel [A, C] and bias [C] of the layer."""
        init = uniform_within(self.width**-0.5)
        return (
            self.param("norm_scale", nn.initializers.ones, (self.width,), self.param_dtype),
            self.param("norm_bias", nn.initializers.zeros, (self.width,), self.param_dtype),
            self.param("kernel", init, (self.width, self.features), self.param_dtype),
            self.param("bias", init, (self.features,), self.param_dtype),
        )


class Mining(nn.Module):
    """Adds to tokens what they find in their cells; sums in float32."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], fine: Float[Array, "B N P A"]) -> Float[Array, "B N C"]:
        """The tokens `x` with what is mined from the cells `fine`.

        Logits that are not finite are made so before the softmax (NaN becomes 0), as in the original.
        """
        width, channels = x.shape[-1], fine.shape[-1]
        fine = fine.astype(self.dtype)
        mean = jnp.mean(fine, axis=-1, dtype=jnp.float32)
        variance = jnp.mean(jnp.square(fine.astype(jnp.float32) - mean[..., None]), axis=-1)
        scale = jax.lax.rsqrt(variance + EPS)  # LN(fine) = (fine - mean) scale, before its own scale and bias

        query = dense(self, layer_norm(self, x, "query_norm", EPS), width, "query")
        norm_scale, norm_bias, kernel, bias = NormedLinear(width, channels, self.param_dtype, name="key")()
        projected = _product("bnd,ad->bna", query, kernel.astype(self.dtype))
        constant = _product("bnd,d->bn", query, bias.astype(self.dtype))
        constant = constant + projected @ norm_bias.astype(jnp.float32)
        projected = (projected * norm_scale.astype(jnp.float32)).astype(self.dtype)
        total = jnp.sum(projected, axis=-1, keepdims=True, dtype=jnp.float32)
        logits = _product("bna,bnpa->bnp", projected, fine)
        logits = (logits - mean * total) * scale + constant[..., None]
        weights = jax.nn.softmax(jnp.nan_to_num(logits / width**0.5), axis=-1)

        norm_scale, norm_bias, kernel, bias = NormedLinear(width, channels, self.param_dtype, name="value")()
        weights = (weights * scale).astype(self.dtype)
        found = _product("bnp,bnpa->bna", weights, fine)
        found = found - jnp.sum(weights.astype(jnp.float32) * mean, axis=-1, keepdims=True)
        found = found * norm_scale.astype(jnp.float32) + norm_bias.astype(jnp.float32)
        value = found.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        return x.astype(self.dtype) + value


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
