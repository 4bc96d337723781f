"""Small layers shared by encoder and decoder."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.models.heads import devices_over
from mllm_jax.models.lora import LoRA

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,  # keep all activations
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Wraps a scanned block in rematerialisation by a policy's name ("none", "full", "dots")."""
    if policy == "none":
        return block
    return nn.remat(block, policy=REMAT_POLICIES[policy], prevent_cse=False)


def layer_norm(eps: float, dtype: Any, param_dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm whose statistics are float32 and whose variance is computed in two passes, as torch does."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


class Dense(nn.Module):
    """`x W + b` with `kernel` [in, out], computed on flattened tokens where no devices share the positions of a row.

    Merging the leading axes lets the weight gradient be one plain matrix product: with [B, T, in] operands
    XLA's CPU backend transposes the activations element by element, which made a training step three times
    slower (jax 0.10 and 0.12).

    Parameters that are there are used: `lora_a`, `lora_b` (lora.py) and `kernel_scale` (quantize.py).

    Attributes:
      parts: into how many equal parts the features are divided, [..., parts, D / parts]; the kernel is the same.
        Devices that share the features then share each part, which they could not were it cut from the product.
      lora: scale and dropout of the adapters, if the parameters hold any.
    """

    features: int
    parts: int = 1
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b C"]) -> Float[Array, "..."]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        shape = (self.features,) if self.parts == 1 else (self.parts, self.features // self.parts)
        # Rows that are cut cannot be merged without bringing their pieces together.
        flat = x if devices_over("length") > 1 else x.reshape(-1, x.shape[-1])
        flat = flat.astype(self.dtype)
        y = jnp.tensordot(flat, kernel.astype(self.dtype).reshape(-1, *shape), 1)
        if self.has_variable("params", "kernel_scale"):
            scale = self.get_variable("params", "kernel_scale").astype(jnp.float32)
            y = (y * scale.reshape(shape)).astype(self.dtype)
        if self.has_variable("params", "lora_a"):
            y = y + self._adapter(flat, shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype).reshape(shape)
        return y.reshape(*x.shape[:-1], *shape)

    def _adapter(self, x: Float[Array, "*n C"], shape: tuple[int, ...]) -> Float[Array, "..."]:
        if self.lora is None:
            raise ValueError(f"{'/'.join(self.path)} holds LoRA adapters, but the model's config has no lora")
        if self.lora.dropout and self.has_rng("dropout"):
            keep = 1 - self.lora.dropout
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x / keep, 0)
        a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
        return jnp.tensordot(x @ a, b.reshape(-1, *shape), 1) * self.lora.scale


class RMSNorm(nn.Module):
    """`x / rms(x) * scale`, statistics in float32, the scale applied after the cast back (as Llama does).

    Attributes:
      offset: the scale is stored minus one and applied before the cast back (as Gemma does).
    """

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (x32 * (1 + scale.astype(jnp.float32))).astype(self.dtype)
        return x32.astype(self.dtype) * scale.astype(self.dtype)
