"""Layers that connectors are made of, in the calling module's dtypes and with the originals' initialisation.

Every function takes the module whose compact method calls it; that module must have `dtype` and
`param_dtype`. `std=None` initialises as torch's `nn.Linear` and `nn.Conv2d` do (kernel and bias uniform
within 1/sqrt(fan in)); a number means N(0, std) kernels and zero biases.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = Callable[..., Any]


def uniform_within(bound: float) -> Initializer:
    """Initialises uniformly in [-bound, bound)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _initializers(fan_in: int, std: float | None) -> dict[str, Initializer]:
    if std is None:
        init = uniform_within(1 / math.sqrt(fan_in))
        return {"kernel_init": init, "bias_init": init}
    return {"kernel_init": nn.initializers.normal(std), "bias_init": nn.initializers.zeros}


def try_out(layers: Callable[[Any, Array], Array], x: Array, width: int = 6) -> tuple[Array, dict[str, Any]]:
    """The output and the fresh parameters of layers in a module of their own, in float32.

    Args:
      layers: called with the module and x, in a compact method.
      width: of the module.

    Examples:
      >>> y, params = try_out(lambda module, x: project(module, x, layers=1), jnp.ones((1, 4, 8)), width=5)
      >>> y.shape, params["layer_0"]["kernel"].shape
      ((1, 4, 5), (8, 5))
    """

    class Net(nn.Module):
        width: int
        dtype = param_dtype = jnp.float32

        @nn.compact
        def __call__(self, x):
            return layers(self, x)

    y, variables = Net(width).init_with_output(jax.random.key(0), x)
    return y, variables["params"]


def dense(
    module: Any,
    x: Float[Array, "*b C"],
    features: int,
    name: str,
    use_bias: bool = True,
    std: float | None = None,
    **init: Initializer,
) -> Float[Array, "*b F"]:
    """`x W + b`; parameters `name/kernel` [C, F] and `name/bias` [F].

    Args:
      init: `kernel_init` or `bias_init`, instead of what `std` says.

    Examples:
      >>> y, params = try_out(lambda module, x: dense(module, x, 5, "map"), jnp.ones((1, 4, 8)))
      >>> y.shape, sorted(params)
      ((1, 4, 5), ['map'])
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name=name,
        **(_initializers(x.shape[-1], std) | init),
    )(x)


def conv(
    module: Any,
    x: Float[Array, "B h w C"],
    features: int,
    name: str,
    kernel: int = 3,
    stride: int = 1,
    depthwise: bool = False,
    use_bias: bool = True,
    std: float | None = None,
) -> Float[Array, "B y x F"]:
    """2-D convolution, zeros around; parameters `name/kernel` [k, k, C or 1, F] and `name/bias` [F].

    Examples:
      >>> y, params = try_out(lambda module, x: conv(module, x, 5, "conv", stride=2), jnp.ones((1, 4, 4, 8)))
      >>> y.shape, sorted(params)
      ((1, 2, 2, 5), ['conv'])
    """
    groups = x.shape[-1] if depthwise else 1
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=[(kernel // 2, kernel // 2)] * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name=name,
        **_initializers(kernel * kernel * x.shape[-1] // groups, std),
    )(x)


def layer_norm(
    module: Any, x: Float[Array, "*b C"], name: str, eps: float = 1e-5, affine: bool = True
) -> Float[Array, "*b C"]:
    """LayerNorm over channels with float32 statistics; parameters `name/scale`, `name/bias` when affine.

    Examples:
      >>> y, params = try_out(lambda module, x: layer_norm(module, x, "norm"), jnp.ones((1, 4, 8)))
      >>> y.shape, sorted(params)
      ((1, 4, 8), ['norm'])
    """
    return nn.LayerNorm(
        epsilon=eps,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        name=name,
    )(x)


def attend(
    q: Float[Array, "*b Q E"],
    k: Float[Array, "*b S E"],
    v: Float[Array, "*b S E"],
    heads: int,
    drop: Callable[[Array], Array] = lambda probabilities: probabilities,
) -> Float[Array, "*b Q E"]:
    """Multi-head attention without a mask: softmax(q k / sqrt(E / heads)) v, softmax in float32.

    Args:
      q, k, v: projected, heads contiguous in the last axis.
      drop: dropout on the attention probabilities.

    Examples:
      >>> attend(jnp.ones((1, 3, 8)), jnp.ones((1, 5, 8)), jnp.ones((1, 5, 8)), heads=2).shape
      (1, 3, 8)
    """
    q, k, v = (a.reshape(*a.shape[:-1], heads, -1) for a in (q, k, v))
    scores = jnp.einsum("...qhd,...shd->...hqs", q, k).astype(jnp.float32) / math.sqrt(q.shape[-1])
    probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype))
    out = jnp.einsum("...hqs,...shd->...qhd", probabilities, v)
    return out.reshape(*out.shape[:-2], -1)


def keep_attention(module: Any, weights: Float[Array, "B H M N"]) -> None:
    """Keeps how a connector's tokens attend to the patches, as the mean over heads, where somebody asks for it.

    It is asked for by a mutable collection "attention" (`inference.attention_maps`), and costs nothing where it is not.

    Args:
      weights: of M tokens on N patches; to be called where a layer's are at hand, such as by `drop` of `attend`.
    """
    if module.is_mutable_collection("attention") and not module.is_initializing():
        module.sow("attention", "patches", weights.astype(jnp.float32).mean(axis=1))


def project(
    module: Any, x: Float[Array, "B M C"], layers: int = 2, name: str = "layer"
) -> Float[Array, "B M D"]:
    """LLaVA's projector `mlp{layers}x_gelu` to `module.width`, in a compact `__call__`.

    Dense C -> D, then (layers - 1) times [exact GELU, Dense D -> D], all with bias; parameters `{name}_0`,
    `{name}_1`, ... A connector that projects twice names each.

    Examples:
      >>> y, params = try_out(lambda module, x: project(module, x), jnp.ones((1, 4, 8)))
      >>> y.shape, sorted(params)
      ((1, 4, 6), ['layer_0', 'layer_1'])
    """
    for i in range(layers):
        if i:
            x = jax.nn.gelu(x, approximate=False)
        x = dense(module, x, module.width, f"{name}_{i}")
    return x


def position_table(module: Any, x: Float[Array, "B N C"]) -> Float[Array, "N C"]:
    """A learned position table for these patches, N(0, 0.02); parameter `position_table`.

    Examples:
      >>> y, params = try_out(lambda module, x: x + position_table(module, x), jnp.ones((2, 4, 8)))
      >>> y.shape, sorted(params)
      ((2, 4, 8), ['position_table'])
    """
    table = module.param("position_table", nn.initializers.normal(0.02), x.shape[1:], module.param_dtype)
    return table.astype(x.dtype)


def append_tokens(module: Any, x: Float[Array, "B M D"], count: int, std: float) -> Float[Array, "B K D"]:
    """x followed by `count` learned tokens, N(0, std); parameter `end_tokens`, absent when there are none.

    Examples:
      >>> y, params = try_out(lambda module, x: append_tokens(module, x, count=2, std=0.02), jnp.ones((1, 4, 8)))
      >>> y.shape, sorted(params)
      ((1, 6, 8), ['end_tokens'])
    """
    if not count:
        return x
    tokens = module.param("end_tokens", nn.initializers.normal(std), (count, x.shape[-1]), module.param_dtype)
    return jnp.concatenate([x, jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)).astype(x.dtype)], axis=1)
