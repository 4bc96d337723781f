"""Dense Connector, dense channel integration: F and group means of all layers on channels (P2 eq. 3-4).

Released code: HJYao00/DenseConnector `dc/model/multimodal_projector/dense_connector.py` (F comes first). The
encoder returns the group means as running sums. The linear variant is in the paper only (eq. 7-8): one shared
Linear(LN(.)) on every layer before the mean. Both its linear map and its LayerNorm's scale and bias commute
with the mean, so they are applied once, to the mean of the affine-free normalised states.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import FeatureRequest, VisionFeatures
from mllm_jax.connectors.layer_sets import equal_groups, groups_between
from mllm_jax.connectors.layers import dense, project
from mllm_jax.connectors.preserving import PreservingConnector


class DCI(PreservingConnector):
    """[F, mean of group 1, ..., mean of group G] on the channel axis, then `mlp2x_gelu` from (G+1) C.

    Attributes:
      groups: G, equal groups of consecutive hidden states by encoder depth (`layer_sets`).
      edges: explicit groups instead: hs[edges[g]] .. hs[edges[g+1] - 1]; (0, 12, 24) is CLIP-L's preset.
      learnable: a Linear(LN(.)), C -> C with bias, shared by all layers before the mean; F stays raw.
    """

    groups: int = 2
    edges: tuple[int, ...] = ()
    learnable: bool = False

    @nn.nowrap
    def layer_groups(self) -> tuple[tuple[int, ...], ...]:
        """The groups of hidden states, shallow to deep."""
        if not self.edges:
            return equal_groups(self.vision, self.groups, "dci.groups")
        groups = groups_between(self.edges, self.vision, "dci.edges")
        if len(groups) != self.groups:
            raise ValueError(f"dci.edges={self.edges} makes {len(groups)} groups, dci.groups={self.groups}")
        return groups

    @nn.nowrap
    def request(self) -> FeatureRequest:
        hidden, groups = (self.vision.select_layer,), self.layer_groups()
        if self.learnable:
            if self.vision.mining == "all":
                raise ValueError(
                    "dci.learnable=True with vision.combine='mining_all': its groups are means of "
                    "normalised states, which cannot be mined one by one; choose 'mining'"
                )
            return FeatureRequest(hidden=hidden, normalized_means=groups)
        return FeatureRequest(hidden=hidden, means=groups)

    @nn.compact
    def tokens(self, features: VisionFeatures) -> Float[Array, "B N D"]:
        return project(self, self.side_by_side(features, self._states))

    def _states(self, features: VisionFeatures) -> list[Array]:
        x = features.hidden[self.vision.select_layer]
        if self.learnable:
            means = jnp.stack(features.normalized_means, axis=1)
            scale = self.param("norm_scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
            bias = self.param("norm_bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
            means = means.astype(self.dtype) * scale.astype(self.dtype) + bias.astype(self.dtype)
            means = dense(self, means, x.shape[-1], "shared")
            means = [means[:, g] for g in range(means.shape[1])]
        else:
            means = features.means
        return [x, *(mean.astype(x.dtype) for mean in means)]
