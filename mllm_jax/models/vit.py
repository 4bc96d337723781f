"""One vision transformer for CLIP and SigLIP towers (reference: connectors.md 1.1 and 1.2).

Hidden states are numbered as in the papers' code: hs[0] are the embeddings (after CLIP's pre-LayerNorm), hs[k]
the output of block k without a final norm. Blocks past the deepest hidden state asked for are not built.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mllm_jax.connectors.base import FeatureRequest, Grid, VisionFeatures
from mllm_jax.models.attention import attend
from mllm_jax.models.layers import ACTIVATIONS, Dense, layer_norm, remat


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Geometry of a tower.

    Attributes:
      width: C.  depth: L.  heads: H.  mlp_width: F.  patch: pixels per patch side.
      image_size: pixels per side that the position table was trained for.
      class_token: one learned token before the patches (CLIP).
      pre_norm: LayerNorm on the embeddings before block 1 (CLIP).
      patch_bias: bias of the patch convolution (SigLIP).
      interpolation: how the position table is resized for other resolutions ("bicubic" or "bilinear").
      mean, std: normalisation of RGB in 0..1, done on the device from uint8.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    image_size: int
    activation: str = "quick_gelu"
    eps: float = 1e-5
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def grid(self, image_size: int) -> Grid:
        """Patch grid of a square picture; pixels that do not fill a patch are dropped (SigLIP 384/14 -> 27)."""
        side = image_size // self.patch
        return (side, side)

    def resolve_layer(self, layer: int) -> int:
        """0..L for a hidden-state index that may be negative (-1 is hs[L]).

        Raises:
          ValueError: outside the tower.
        """
        index = layer + self.depth + 1 if layer < 0 else layer
        if not 0 <= index <= self.depth:
            raise ValueError(f"vision.select_layer={layer} is outside hs[0..{self.depth}] of this tower")
        return index


def interpolation_matrix(length: int, out: int, method: str) -> np.ndarray:
    """float32[out, length]: 1-D resize with half-pixel centres and no antialiasing, as torch's `interpolate`.

    Bicubic uses the cubic convolution kernel with a = -0.75 and border samples repeated.
    """
    matrix = np.zeros((out, length), np.float64)
    scale = length / out
    for row in range(out):
        centre = (row + 0.5) * scale - 0.5
        if method == "bilinear":
            centre = max(centre, 0.0)
        base = int(np.floor(centre))
        t = centre - base
        if method == "bilinear":
            taps = {0: 1 - t, 1: t}
        else:
            a = -0.75

            def near(d, a=a):
                return (a + 2) * d**3 - (a + 3) * d**2 + 1

            def far(d, a=a):
                return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

            taps = {-1: far(1 + t), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
        for offset, weight in taps.items():
            matrix[row, min(max(base + offset, 0), length - 1)] += weight
    return matrix.astype(np.float32)


def resize_position_table(table: Float[Array, "N C"], old: Grid, new: Grid, method: str) -> Float[Array, "M C"]:
    """Resizes the patch part of a position table from grid `old` to grid `new` (float32)."""
    if old == new:
        return table
    rows = interpolation_matrix(old[0], new[0], method)
    columns = interpolation_matrix(old[1], new[1], method)
    grid = table.astype(jnp.float32).reshape(*old, -1)
    out = jnp.einsum("hwc,yh,xw->yxc", grid, rows, columns, precision="highest")
    return out.reshape(new[0] * new[1], -1)


class Block(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)); keeps requested hidden states in `slots` as it goes."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any
    attention: str

    @nn.compact
    def __call__(self, carry, weights):
        cfg = self.config
        x, slots = carry
        batch, length, _ = x.shape

        def dense(features, name):
            return Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        y = layer_norm(cfg.eps, self.dtype, self.param_dtype, "norm1")(x)
        q, k, v = (dense(cfg.width, n)(y).reshape(batch, length, cfg.heads, -1) for n in ("q", "k", "v"))
        y = attend(q, k, v, implementation=self.attention).reshape(batch, length, cfg.width)
        x = x + dense(cfg.width, "out")(y)
        y = layer_norm(cfg.eps, self.dtype, self.param_dtype, "norm2")(x)
        y = ACTIVATIONS[cfg.activation](dense(cfg.mlp_width, "fc1")(y))
        x = x + dense(cfg.width, "fc2")(y)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        return (x, accumulate(slots, x, weights)), None


def accumulate(slots: tuple, x: Array, weights: Array) -> tuple:
    """slots[j] + weights[j] * x; a zero weight adds nothing, whatever x holds."""
    return tuple(
        slot + jnp.where(weights[j] != 0, weights[j] * x.astype(slot.dtype), 0) for j, slot in enumerate(slots)
    )


class VisionTransformer(nn.Module):
    """The tower, as deep as `request` needs.

    Attributes:
      request: hidden states and group means to return.
      dtype, param_dtype: computation and parameter dtypes.
      remat: "none", "full" or "dots".
    """

    config: VisionConfig
    request: FeatureRequest
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"

    @nn.compact
    def __call__(self, images: Array, keep_prefix: bool = False) -> VisionFeatures:
        """Encodes pictures.

        Args:
          images: uint8[B, S, S, 3] (normalised here) or float[B, S, S, 3] already normalised; any S.
          keep_prefix: keep the class token at index 0 of every feature (parity tests); N grows by one.

        Returns:
          The requested hidden states [B, N, C] and group means, patches in row-major order.
        """
        cfg = self.config
        grid = (images.shape[1] // cfg.patch, images.shape[2] // cfg.patch)
        x = self._embed(images, grid)
        slots_of = [{k: 1.0} for k in self.request.hidden]
        slots_of += [{k: 1.0 / len(group) for k in group} for group in self.request.means]
        depth = self.request.deepest
        weights = np.zeros((depth + 1, len(slots_of)), np.float32)
        for j, slot in enumerate(slots_of):
            for k, weight in slot.items():
                weights[k, j] = weight
        zeros = tuple(
            jnp.zeros(x.shape, self.dtype if len(slot) == 1 else jnp.float32) for slot in slots_of
        )  # means are summed in float32
        slots = accumulate(zeros, x, weights[0])
        if depth:
            blocks = nn.scan(
                remat(Block, self.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=depth,
            )(cfg, self.dtype, self.param_dtype, self.attention, name="blocks")
            (_, slots), _ = blocks((x, slots), jnp.asarray(weights[1:]))
        if not keep_prefix:
            slots = tuple(slot[:, int(cfg.class_token) :] for slot in slots)
        slots = tuple(slot.astype(self.dtype) for slot in slots)
        count = len(self.request.hidden)
        return VisionFeatures(dict(zip(self.request.hidden, slots[:count], strict=True)), slots[count:], grid)

    def _embed(self, images: Array, grid: Grid) -> Float[Array, "B N C"]:
        cfg = self.config
        batch = images.shape[0]
        if images.dtype == jnp.uint8:
            mean, std = (jnp.asarray(v, jnp.float32) for v in (cfg.mean, cfg.std))
            images = (images.astype(jnp.float32) / 255 - mean) / std
        images = images[:, : grid[0] * cfg.patch, : grid[1] * cfg.patch].astype(self.dtype)
        # The patch convolution as a matrix product over (row, column, channel) of each patch.
        patches = images.reshape(batch, grid[0], cfg.patch, grid[1], cfg.patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid[0] * grid[1], -1)
        x = Dense(
            cfg.width,
            use_bias=cfg.patch_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="patch_embed",
        )(patches)
        prefix = int(cfg.class_token)
        native = cfg.grid(cfg.image_size)
        table = self.param(
            "pos_embed",
            nn.initializers.normal(0.02),
            (prefix + native[0] * native[1], cfg.width),
            self.param_dtype,
        )
        positions = resize_position_table(table[prefix:], native, grid, cfg.interpolation)
        if cfg.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (cfg.width,), self.param_dtype)
            x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (batch, 1, cfg.width)), x], axis=1)
            positions = jnp.concatenate([table[:prefix], positions.astype(table.dtype)])
        x = x + positions.astype(self.dtype)
        if cfg.pre_norm:
            x = layer_norm(cfg.eps, self.dtype, self.param_dtype, "pre_norm")(x)
        return nn.with_logical_constraint(x, ("batch", "length", "embed"))


