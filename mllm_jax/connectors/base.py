"""The connector contract: what a connector asks of the vision encoder and what it gives to the LLM."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Grid = tuple[int, int]  # patch rows, patch columns


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """What a connector knows of the vision encoder before anything is computed.

    Attributes:
      width: C, channels of every hidden state.
      depth: L, number of blocks; hidden states are hs[0] (embeddings) to hs[L].
      select_layer: the hidden state that is "the" feature F, already resolved to 0..L
        (LLaVA's -2 of a 24-block tower is 23).
      grid: patch grid at the configured resolution; only position tables may depend on it.
    """

    width: int
    depth: int
    select_layer: int
    grid: Grid


@dataclasses.dataclass(frozen=True)
class FeatureRequest:
    """Hidden states (and means over groups of them) that a connector needs.

    Attributes:
      hidden: indices k of hs[k].
      means: groups of indices; the encoder returns the mean over each group, as a running sum.
    """

    hidden: tuple[int, ...]
    means: tuple[tuple[int, ...], ...] = ()

    @property
    def deepest(self) -> int:
        """The deepest hidden state used: blocks after it are not built."""
        return max((*self.hidden, *(k for group in self.means for k in group)))


@flax.struct.dataclass
class VisionFeatures:
    """What the encoder returns for a `FeatureRequest`: patch tokens in row-major order.

    Attributes:
      hidden: {k: hs[k]}, each [B, N, C].
      means: one [B, N, C] per requested group.
      grid: (rows, columns), rows * columns = N.
    """

    hidden: dict[int, Float[Array, "B N C"]]
    means: tuple[Float[Array, "B N C"], ...] = ()
    grid: Grid = flax.struct.field(pytree_node=False, default=(0, 0))


class Connector(nn.Module):
    """Base of all connectors. Subclasses live in one file each and stand in the table of `connectors`.

    The fields below are given by the model; a subclass adds its options as further fields, each with a
    default, and these (and only these) are what `config.model.connector.<name>` may set.

    Attributes:
      vision: the encoder.
      width: D, width of the LLM's embeddings.
      dtype: computation dtype.
      param_dtype: parameter dtype.
    """

    vision: VisionSpec
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def request(self) -> FeatureRequest:
        """Hidden states needed; plain Python. Default: the selected feature F alone."""
        return FeatureRequest(hidden=(self.vision.select_layer,))

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        """M, the visual tokens for one image with this patch grid; plain Python, no tracing.

        Raises:
          ValueError: the connector is not defined on this grid.
        """
        raise ValueError(f"{type(self).__name__} does not define num_tokens")

    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        """Maps encoder features to LLM-width visual tokens, row-major."""
        raise ValueError(f"{type(self).__name__} does not define __call__")

    def selected(self, features: VisionFeatures) -> Float[Array, "B N C"]:
        """The feature F."""
        return features.hidden[self.vision.select_layer]


def dense(connector: Connector, features: int, name: str, use_bias: bool = True) -> nn.Dense:
    """A Dense layer in the connector's dtypes, initialised like torch's `nn.Linear` (uniform, 1/sqrt(fan in))."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        dtype=connector.dtype,
        param_dtype=connector.param_dtype,
        name=name,
    )


def project(connector: Connector, x: Float[Array, "B M C"], layers: int = 2) -> Float[Array, "B M D"]:
    """LLaVA's projector, as the last part of a connector's compact `__call__`.

    Dense C -> D, then (layers - 1) times [exact GELU, Dense D -> D], all with bias; parameters `layer_0`, `layer_1`, ...
    """
    for i in range(layers):
        if i:
            x = jax.nn.gelu(x, approximate=False)
        x = dense(connector, connector.width, name=f"layer_{i}")(x)
    return x
