"""TokenPacker: each token of a coarse grid attends to the r x r region of detailed patches it stands for.

Source: CircleRadon/TokenPacker `llava/model/multimodal_projector/builder.py` and (layers)
`multimodal_encoder/ clip_encoder.py`. Queries: F, bilinearly reduced by r. Keys and values: hs[12], hs[16],
hs[22], hs[23] of CLIP-L, concatenated on channels.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import Connector, FeatureRequest, Grid, VisionFeatures
from mllm_jax.connectors.grids import divided, resize_grid
from mllm_jax.connectors.layer_sets import check_layers, token_packer_layers
from mllm_jax.connectors.layers import attend, dense, layer_norm, uniform_within

STD = 0.02
EPS = 1e-6


class TokenPacker(Connector):
    """Region-wise cross-attention, then Linear E -> D, GELU, Linear D -> D.

    Attributes:
      factor: r; must divide the grid.
      hidden: E, width of queries, keys and values.
      heads: attention heads.
      layers: hidden states of the details, in channel order; empty: preset by encoder depth (`layer_sets`).
    """

    factor: int = 2
    hidden: int = 1024
    heads: int = 8
    layers: tuple[int, ...] = ()

    @nn.nowrap
    def detail_layers(self) -> tuple[int, ...]:
        """The hidden states of keys and values."""
        layers = self.layers or token_packer_layers(self.vision)
        return check_layers(layers, self.vision, "token_packer.layers")

    @nn.nowrap
    def request(self) -> FeatureRequest:
        return FeatureRequest(hidden=tuple(dict.fromkeys((self.vision.select_layer, *self.detail_layers()))))

    @nn.nowrap
    def token_grid(self, grid: Grid) -> Grid | None:
        return divided(grid, self.factor, "token_packer.factor")

    @nn.nowrap
    def num_tokens(self, grid: Grid) -> int:
        if self.hidden % self.heads:
            raise ValueError(
                f"token_packer.heads={self.heads} does not divide token_packer.hidden={self.hidden}"
            )
        rows, columns = divided(grid, self.factor, "token_packer.factor")
        return rows * columns

    @nn.compact
    def __call__(self, features: VisionFeatures, deterministic: bool = True) -> Float[Array, "B M D"]:
        self.num_tokens(features.grid)
        out, width = divided(features.grid, self.factor, "token_packer.factor"), self.hidden
        features = self.mined(features)
        x = self.selected(features)
        details = jnp.concatenate([features.hidden[k].astype(x.dtype) for k in self.detail_layers()], axis=-1)

        q = dense(self, resize_grid(x, features.grid, out), width, "query", use_bias=False, std=STD)
        q = layer_norm(self, q, "query_norm", EPS)[:, :, None]
        k, v = (self._regions(self._expand(details, name), features.grid) for name in ("key", "value"))
        # torch draws q, k and v of its attention from one Xavier-uniform [3E, E] matrix.
        xavier = uniform_within(math.sqrt(6 / (4 * width)))
        q, k, v = (
            dense(self, a, width, n, std=STD, kernel_init=xavier) for a, n in ((q, "q"), (k, "k"), (v, "v"))
        )
        x = dense(self, attend(q, k, v, self.heads)[:, :, 0], width, "out", std=STD)

        x = jax.nn.gelu(dense(self, x, self.width, "layer_0", std=STD), approximate=False)
        return dense(self, x, self.width, "layer_1", std=STD)

    def _expand(self, details: Float[Array, "B N C"], name: str) -> Float[Array, "B N E"]:
        x = jax.nn.gelu(dense(self, details, self.hidden, f"{name}_0", std=STD), approximate=False)
        return layer_norm(self, dense(self, x, self.hidden, f"{name}_1", std=STD), f"{name}_norm", EPS)

    def _regions(self, x: Float[Array, "B N E"], grid: Grid) -> Float[Array, "B M R E"]:
        rows, columns = divided(grid, self.factor, "token_packer.factor")
        x = x.reshape(x.shape[0], rows, self.factor, columns, self.factor, self.hidden)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * columns, self.factor**2, self.hidden)
