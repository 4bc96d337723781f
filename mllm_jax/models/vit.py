"""One vision transformer for CLIP, SigLIP, SigLIP 2 and DINOv2 towers (connectors.md 1.1 and 1.2).

Hidden states are numbered as in the papers' code: hs[0] are the embeddings (after CLIP's pre-LayerNorm),
hs[k] the output of block k without a final norm. Blocks past the deepest state asked for are not built.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mllm_jax.connectors.base import FeatureRequest, Grid, VisionFeatures, normalize
from mllm_jax.models.attention import AttentionMask, attend
from mllm_jax.models.layers import ACTIVATIONS, Dense, layer_norm, remat
from mllm_jax.models.lora import LoRA
from mllm_jax.models.positions import METHODS, positions_of_grids, resize_position_table
from mllm_jax.models.single_encoder import SingleEncoder


@dataclasses.dataclass(frozen=True)
class VisionConfig(SingleEncoder):
    """Geometry of a tower.

    Attributes:
      width: C.  depth: L.  heads: H.  mlp_width: F.  patch: pixels per patch side.
      image_size: pixels per side that the position table was trained for.
      class_token: one learned token before the patches (CLIP).
      pre_norm: LayerNorm on the embeddings before block 1 (CLIP).
      patch_bias: bias of the patch convolution (SigLIP, DINOv2).
      interpolation: how the position table is resized for other resolutions (positions.METHODS).
      mean, std: normalisation of RGB in 0..1, done on the device from uint8.
      registers: learned tokens between class token and patches, without position (DINOv2).
      layer_scale: a learned factor per channel on what each half of a block adds (DINOv2).
      gated: SwiGLU, silu(first half of fc1 x) * second half, mlp_width each (DINOv2-giant).
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
    registers: int = 0
    layer_scale: bool = False
    gated: bool = False

    def __post_init__(self):
        if self.interpolation not in METHODS:
            raise ValueError(f"vision.interpolation={self.interpolation!r}; valid: {', '.join(METHODS)}")

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.registers

    @property
    def native(self) -> bool:
        """Whether it takes images at their own aspect ratio (NaFlex), whose positions are resized with antialiasing."""
        return self.interpolation == "bilinear_antialias" and not self.prefix

    @property
    def crops(self) -> bool:
        """Whether its family's image processor takes the central square; SigLIP's stretches the image instead."""
        return self.class_token

    @property
    def fine_layer(self) -> int:
        """The hidden state that is mined where this is the encoder of fine features: the penultimate one."""
        return max(self.depth - 1, 0)

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"ViT {self.depth} x {self.width}, patch {self.patch}"

    def grid(self, height: int, width: int | None = None) -> Grid:
        """Patch grid of an image; pixels that fill no patch are dropped (SigLIP 384/14 -> 27).

        Args:
          height, width: in pixels; without a width the image is square.
        """
        return (height // self.patch, (height if width is None else width) // self.patch)

    def resolve_layer(self, layer: int) -> int:
        """0..L for a hidden-state index that may be negative (-1 is hs[L]).

        Raises:
          ValueError: outside the tower.
        """
        index = layer + self.depth + 1 if layer < 0 else layer
        if not 0 <= index <= self.depth:
            raise ValueError(f"vision.select_layer={layer} is outside hs[0..{self.depth}] of this tower")
        return index


def normalize_pixels(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(images / 255 - mean) / std in float32 of uint8 pixels [..., 3]; others are normalised already."""
    if images.dtype != jnp.uint8:
        return images
    mean, std = (jnp.asarray(v, jnp.float32) for v in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


class Block(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)); keeps requested hidden states in `slots` as it goes."""

    config: VisionConfig
    dtype: Any
    param_dtype: Any
    attention: str
    lora: LoRA | None
    normalized: tuple[bool, ...]  # per slot: the mean is over normalised states

    @nn.compact
    def __call__(self, carry, weights):
        cfg = self.config
        x, slots, segments = carry
        batch, length, _ = x.shape
        mask = None if segments is None else AttentionMask(segments, segments, causal=False)

        def dense(features, name, parts=1):
            kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype, "lora": self.lora}
            return Dense(features, parts, name=name, **kinds)

        def scaled(y, name):
            if not cfg.layer_scale:
                return y
            return y * self.param(name, nn.initializers.ones, (cfg.width,), self.param_dtype).astype(y.dtype)

        y = layer_norm(cfg.eps, self.dtype, self.param_dtype, "norm1")(x)
        q, k, v = (dense(cfg.width, n)(y).reshape(batch, length, cfg.heads, -1) for n in ("q", "k", "v"))
        y = attend(q, k, v, mask, self.attention).reshape(batch, length, cfg.width)
        x = x + scaled(dense(cfg.width, "out")(y), "scale1")
        y = layer_norm(cfg.eps, self.dtype, self.param_dtype, "norm2")(x)
        if cfg.gated:
            y = dense(2 * cfg.mlp_width, "fc1", parts=2)(y)
            y = ACTIVATIONS["silu"](y[..., 0, :]) * y[..., 1, :]
        else:
            y = ACTIVATIONS[cfg.activation](dense(cfg.mlp_width, "fc1")(y))
        x = x + scaled(dense(cfg.width, "fc2")(y), "scale2")
        x = nn.with_logical_constraint(x, ("batch", None, "embed"))
        return (x, accumulate(slots, x, weights, self.normalized), segments), None


def accumulate(slots: tuple, x: Array, weights: Array, normalized: tuple[bool, ...]) -> tuple:
    """slots[j] + weights[j] * (x, normalised or not); a zero weight adds nothing, whatever x holds."""
    states = (normalize(x) if each else x for each in normalized)
    return tuple(
        slot + jnp.where(weights[j] != 0, weights[j] * state.astype(slot.dtype), 0)
        for j, (slot, state) in enumerate(zip(slots, states, strict=True))
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
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self, images: Array, grids: Int[Array, "B 2"] | None = None, keep_prefix: bool = False
    ) -> VisionFeatures:
        """Encodes images.

        Args:
          images: uint8[B, H, W, 3] (normalised here) or float[B, H, W, 3] already normalised; any size.
          grids: rows and columns of the patches that each image holds one beside the other (`data.naflex`). What is
            behind them is neither attended to nor of any meaning in the result. None: an image is what it seems.
          keep_prefix: keep class token and registers in front of every feature (parity tests).

        Returns:
          The requested hidden states [B, N, C] and group means, patches in row-major order.
        """
        cfg = self.config
        grid = (images.shape[1] // cfg.patch, images.shape[2] // cfg.patch)
        x = self._embed(images, grid, grids)
        segments = None
        if grids is not None:
            segments = (jnp.arange(x.shape[1]) < jnp.prod(grids, axis=1, keepdims=True)).astype(jnp.int32)
        request = self.request
        slots_of = [{k: 1.0} for k in request.hidden]
        slots_of += [
            dict.fromkeys(group, 1 / len(group)) for group in (*request.means, *request.normalized_means)
        ]
        normalized = tuple(j >= len(slots_of) - len(request.normalized_means) for j in range(len(slots_of)))
        depth = request.deepest
        weights = np.zeros((depth + 1, len(slots_of)), np.float32)
        for j, slot in enumerate(slots_of):
            for k, weight in slot.items():
                weights[k, j] = weight
        zeros = tuple(
            jnp.zeros(x.shape, self.dtype if len(slot) == 1 else jnp.float32) for slot in slots_of
        )  # means are summed in float32
        slots = accumulate(zeros, x, jnp.asarray(weights[0]), normalized)
        if depth:
            blocks = nn.scan(
                remat(Block, self.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=depth,
            )(cfg, self.dtype, self.param_dtype, self.attention, self.lora, normalized, name="blocks")
            (_, slots, _), _ = blocks((x, slots, segments), jnp.asarray(weights[1:]))
        if not keep_prefix:
            slots = tuple(slot[:, cfg.prefix :] for slot in slots)
        slots = tuple(slot.astype(self.dtype) for slot in slots)
        first, second = len(request.hidden), len(request.hidden) + len(request.means)
        hidden = dict(zip(request.hidden, slots[:first], strict=True))
        return VisionFeatures(hidden, slots[first:second], grid, slots[second:])

    def _embed(self, images: Array, grid: Grid, grids: Array | None) -> Float[Array, "B N C"]:
        cfg = self.config
        batch = images.shape[0]
        images = normalize_pixels(images, cfg.mean, cfg.std)
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
        prefix = int(cfg.class_token)  # has a position; registers do not
        native = cfg.grid(cfg.image_size)
        table = self.param(
            "pos_embed",
            nn.initializers.normal(0.02),
            (prefix + native[0] * native[1], cfg.width),
            self.param_dtype,
        )
        if grids is None:
            positions = resize_position_table(table[prefix:], native, grid, cfg.interpolation)
        else:
            positions = positions_of_grids(table, native, grids, grid[1])
        if cfg.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (cfg.width,), self.param_dtype)
            x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (batch, 1, cfg.width)), x], axis=1)
            positions = jnp.concatenate([table[:prefix], positions.astype(table.dtype)])
        x = x + positions.astype(self.dtype)
        if cfg.registers:
            shape = (cfg.registers, cfg.width)
            tokens = self.param("registers", nn.initializers.normal(0.02), shape, self.param_dtype)
            tokens = jnp.broadcast_to(tokens.astype(x.dtype), (batch, *shape))
            x = jnp.concatenate([x[:, :prefix], tokens, x[:, prefix:]], axis=1)
        if cfg.pre_norm:
            x = layer_norm(cfg.eps, self.dtype, self.param_dtype, "pre_norm")(x)
        return nn.with_logical_constraint(x, ("batch", None, "embed"))
