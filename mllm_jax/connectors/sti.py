"""Dense Connector, sparse token integration: pooled tokens of shallow layers follow the tokens of F (P2 3.2).

Released code: HJYao00/DenseConnector `dc/model/multimodal_projector/dense_connector.py`; the convolution
variant is in the paper only (eq. 5). Pooling runs over the flattened row-major sequence, so windows may
straddle rows, and tokens that do not fill a window are dropped.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, FeatureRequest, Grid, VisionFeatures
from mllm_jax.connectors.layer_sets import check_layers, spread_layers
from mllm_jax.connectors.layers import project, uniform_within


class STI(Connector):
    """[F, pooled hs[a], pooled hs[b]] on the token axis, then one shared `mlp2x_gelu`.

    Attributes:
      layers: the extra hidden states, in the order of their tokens; empty: preset by encoder depth
        (`layer_sets`).
      window: tokens averaged into one (alpha).
      learnable: one 1-D convolution C -> C shared by the layers (kernel = stride = window, bias) instead of
        the mean.
    """

    layers: tuple[int, ...] = ()
    window: int = 8
    learnable: bool = False

    @nn.nowrap
    def extra_layers(self) -> tuple[int, ...]:
        """The hidden states whose pooled tokens are added."""
        layers = self.layers or spread_layers(self.vision, "sti.layers")
        return check_layers(layers, self.vision, "sti.layers")

    @nn.nowrap
    def request(self) -> FeatureRequest:
        return FeatureRequest(hidden=tuple(dict.fromkeys((self.vision.select_layer, *self.extra_layers()))))

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        patches = grid[0] * grid[1]
        if not 1 <= self.window <= patches:
            raise ValueError(f"sti.window={self.window} is not within the {patches} patches of the grid")
        return patches + len(self.extra_layers()) * (patches // self.window)

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        features = self.mined(features)
        x = self.selected(features)
        extra = jnp.stack([features.hidden[k] for k in self.extra_layers()], axis=1).astype(x.dtype)
        batch, layers, patches, width = extra.shape
        count = patches // self.window
        windows = extra[:, :, : count * self.window].reshape(batch, layers * count, self.window, width)
        if self.learnable:
            # A convolution whose stride equals its kernel is a dense layer on each window.
            pooled = nn.DenseGeneral(
                width,
                axis=(-2, -1),
                kernel_init=uniform_within((self.window * width) ** -0.5),
                bias_init=uniform_within((self.window * width) ** -0.5),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="conv",
            )(windows)
        else:
            pooled = jnp.mean(windows.astype(jnp.float32), axis=2)
        return project(self, jnp.concatenate([x, pooled.astype(x.dtype)], axis=1))
