"""Dense Connector, sparse channel integration: F and shallow layers concatenated on channels (P2 3.2).

Released code: HJYao00/DenseConnector `dc/model/multimodal_projector/dense_connector.py` (F comes first, which
checkpoints depend on); the convolution variant is in the paper only (eq. 6), which does not state padding,
output width, bias, activation or residual: padding 1, C -> C, bias, none, none are taken here.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import FeatureRequest, VisionFeatures
from mllm_jax.connectors.layer_sets import check_layers, spread_layers
from mllm_jax.connectors.layers import conv, project
from mllm_jax.connectors.preserving import PreservingConnector


class SCI(PreservingConnector):
    """[F, hs[a], hs[b]] on the channel axis, then `mlp2x_gelu` from 3 C.

    Attributes:
      layers: the extra hidden states, in channel order; empty: preset by encoder depth (`layer_sets`).
      learnable: one 3x3 convolution, shared by all layers and F, before the concatenation.
    """

    layers: tuple[int, ...] = ()
    learnable: bool = False

    @nn.nowrap
    def channel_layers(self) -> tuple[int, ...]:
        """The hidden states in channel order, F first."""
        layers = self.layers or spread_layers(self.vision, "sci.layers")
        return check_layers((self.vision.select_layer, *layers), self.vision, "select_layer and sci.layers")

    @nn.nowrap
    def treats_patches_alone(self) -> bool:
        return not self.learnable and super().treats_patches_alone()

    @nn.nowrap
    def request(self) -> FeatureRequest:
        return FeatureRequest(hidden=self.channel_layers())

    @nn.compact
    def tokens(self, features: VisionFeatures) -> Float[Array, "B N D"]:
        return project(self, self.side_by_side(features, self._states))

    def _states(self, features: VisionFeatures) -> list[Array]:
        x = features.hidden[self.vision.select_layer]
        states = [features.hidden[k].astype(x.dtype) for k in self.channel_layers()]
        if self.learnable:
            _, patches, width = x.shape
            stacked = jnp.concatenate(states, axis=0).reshape(-1, *features.grid, width)
            stacked = conv(self, stacked, width, "conv").reshape(-1, patches, width)
            states = jnp.split(stacked, len(states), axis=0)
        return states
