"""ConvNeXt as a vision encoder: the maps of all its stages side by side, as Mini-Gemini reads them (extensions.md 3).

    stem       4 x 4 patches, LayerNorm
    stage      LayerNorm and 2 x 2 patches (not before the first), then blocks: 7 x 7 depthwise convolution, LayerNorm,
               MLP of four times the width with exact GELU, times a factor per channel, plus the input

The stages halve the grid. Each one's output is brought to the first one's grid (bilinear, half-pixel centres, float32)
and all lie on the channel axis. Norm and head behind the last stage are not part of this.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax import limits
from mllm_jax.connectors.base import FeatureRequest, Grid, VisionFeatures
from mllm_jax.connectors.grids import joined_maps
from mllm_jax.data.batch import Size
from mllm_jax.models.layers import ACTIVATIONS, Dense, layer_norm, remat
from mllm_jax.models.lora import LoRA
from mllm_jax.models.single_encoder import SingleEncoder
from mllm_jax.models.vit import normalize_pixels

PATCH = 4  # pixels per side that a position of the first stage stands for
KERNEL = 7  # of the depthwise convolutions


@dataclasses.dataclass(frozen=True)
class ConvNextConfig(SingleEncoder):
    """Geometry of a ConvNeXt.

    It has one feature, hs[1]: the maps of all stages.

    Attributes:
      widths: channels of each stage.
      depths: blocks of each stage.
      image_size: pixels per side that it was trained with.
      mean, std: normalisation of RGB in 0..1, done on the device from uint8.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    image_size: int
    eps: float = 1e-6
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    depth = 1
    patch = PATCH
    crops = True
    fine_layer = 1

    def __post_init__(self):
        if len(self.widths) != len(self.depths) or not self.widths or min(*self.widths, *self.depths) < 1:
            raise ValueError(f"a ConvNeXt of widths {self.widths} and depths {self.depths} has no stages")
        limits.check("MAX_LAYERS", max(self.depths), "a ConvNeXt's depths")
        limits.check("MAX_WIDTH", max(self.widths), "a ConvNeXt's widths")

    @property
    def width(self) -> int:
        """C: channels of all stages together."""
        return sum(self.widths)

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"ConvNeXt {'-'.join(map(str, self.depths))} x {'-'.join(map(str, self.widths))}"

    def grid(self, height: int, width: int | None = None) -> Grid:
        """Positions of the first stage; pixels that fill no patch are dropped.

        Args:
          height, width: in pixels; without a width the image is square.
        """
        return (height // PATCH, (height if width is None else width) // PATCH)

    def maps(self, size: Size) -> tuple[tuple[Grid, int], ...]:
        """Those of its stages."""
        rows, columns = self.grid(*size)
        return tuple(((rows >> k, columns >> k), width) for k, width in enumerate(self.widths))

    def resolve_layer(self, layer: int) -> int:
        """1, the only feature, for 1 or -1.

        Raises:
          ValueError: another one is asked for.
        """
        if layer not in (1, -1):
            raise ValueError(f"vision.select_layer={layer}: a ConvNeXt has one feature, hs[1]; give -1")
        return 1

    def with_depth(self, depth: int) -> "ConvNextConfig":
        """Itself: its one feature needs all of its blocks."""
        return self


class Block(nn.Module):
    """One block at the width of its input."""

    config: ConvNextConfig
    dtype: Any
    param_dtype: Any
    lora: LoRA | None

    @nn.compact
    def __call__(self, x, _):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = x.shape[-1]
        side = (KERNEL, KERNEL)
        padding = [(KERNEL // 2, KERNEL // 2)] * 2
        y = nn.Conv(width, side, padding=padding, feature_group_count=width, name="conv", **kinds)(x)
        y = layer_norm(self.config.eps, self.dtype, self.param_dtype, "norm")(y)
        y = ACTIVATIONS["gelu"](Dense(4 * width, lora=self.lora, name="fc1", **kinds)(y))
        y = Dense(width, lora=self.lora, name="fc2", **kinds)(y)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,), self.param_dtype)
        return x + y * gamma.astype(self.dtype), None


class Stage(nn.Module):
    """Some blocks, behind what halves the grid in every stage but the first."""

    config: ConvNextConfig
    index: int
    dtype: Any
    param_dtype: Any
    remat: str
    lora: LoRA | None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B y x C"]:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.index:
            x = layer_norm(self.config.eps, self.dtype, self.param_dtype, "norm")(x)
            x = Dense(self.config.widths[self.index], name="down", **kinds)(_patches(x, 2))
        blocks = nn.scan(
            remat(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.config.depths[self.index],
        )(self.config, self.dtype, self.param_dtype, self.lora, name="blocks")
        return blocks(x, None)[0]


class ConvNext(nn.Module):
    """The encoder; fields as in `vit.VisionTransformer`, of which `attention` computes nothing here."""

    config: ConvNextConfig
    request: FeatureRequest
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, images: Array) -> VisionFeatures:
        """Encodes images [B, H, W, 3], uint8 or normalised already.

        Returns:
          hs[1]: the maps of all stages at the resolution of the first, [B, N, C]; and `maps`, as they are.

        Raises:
          ValueError: other features are asked for.
        """
        cfg = self.config
        if self.request != FeatureRequest(hidden=(1,)):
            raise ValueError(
                "a ConvNeXt has one feature, hs[1]; give select_layer=-1 and a connector of F alone"
            )
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = normalize_pixels(images, cfg.mean, cfg.std).astype(self.dtype)
        x = Dense(cfg.widths[0], name="stem", **kinds)(_patches(x, PATCH))
        x = layer_norm(cfg.eps, self.dtype, self.param_dtype, "stem_norm")(x)
        grid = x.shape[1:3]
        maps = []
        for index in range(len(cfg.widths)):
            x = Stage(cfg, index, self.dtype, self.param_dtype, self.remat, self.lora, name=f"stage_{index}")(
                x
            )
            x = nn.with_logical_constraint(x, ("batch", None, None, "embed"))
            maps.append(x)
        joined = joined_maps(maps, grid).reshape(x.shape[0], grid[0] * grid[1], -1)
        return VisionFeatures({1: joined}, grid=grid, maps=tuple(maps))


def _patches(x: Float[Array, "B h w c"], side: int) -> Float[Array, "B y x F"]:
    """Squares of `side` x `side` positions as vectors over (row, column, channel); what fills none is dropped."""
    batch, height, width, channels = x.shape
    rows, columns = height // side, width // side
    x = x[:, : rows * side, : columns * side].reshape(batch, rows, side, columns, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
