"""Several vision towers seen as one: their hidden states side by side on the channel axis (SigLIP + DINOv2).

Towers of different depth are aligned at their ends: hs[-1-k] of the whole is hs[-1-k] of every tower, so that
`select_layer=-2` takes the penultimate block of each. All see the same image, each with its own normalization, and
must cut it into the same grid.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from mllm_jax.connectors.base import FeatureRequest, Grid, VisionFeatures
from mllm_jax.models.lora import LoRA
from mllm_jax.models.vit import VisionConfig, VisionTransformer


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """Towers in channel order.

    Attributes:
      towers: at least two.
    """

    towers: tuple[VisionConfig, ...]

    @property
    def width(self) -> int:
        """C: channels of all towers together."""
        return sum(tower.width for tower in self.towers)

    @property
    def depth(self) -> int:
        """Blocks of the shallowest tower."""
        return min(tower.depth for tower in self.towers)

    @property
    def patch(self) -> int:
        """Pixels per patch side of the first tower."""
        return self.towers[0].patch

    @property
    def image_size(self) -> int:
        """Pixels per side that the first tower was trained for."""
        return self.towers[0].image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the first tower."""
        return self.towers[0].mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Of the first tower."""
        return self.towers[0].std

    def grid(self, height: int, width: int | None = None) -> Grid:
        """Patch grid of an image; see `VisionConfig.grid`.

        Raises:
          ValueError: the towers would cut it into different grids.
        """
        grids = {tower.grid(height, width) for tower in self.towers}
        if len(grids) > 1:
            found = ", ".join(f"{t.grid(height, width)} with patches of {t.patch}" for t in self.towers)
            size = height if width is None else (height, width)
            raise ValueError(
                f"vision.image_size={size}: the fused towers have different patch grids ({found}); choose towers "
                "with one patch size"
            )
        return grids.pop()

    def resolve_layer(self, layer: int) -> int:
        """0..L for a hidden-state index that may be negative; see `VisionConfig.resolve_layer`."""
        return dataclasses.replace(self.towers[0], depth=self.depth).resolve_layer(layer)

    def tower_layer(self, tower: int, layer: int) -> int:
        """The index in a tower of the hidden state that is hs[layer] of the whole."""
        return self.towers[tower].depth - self.depth + layer


class Encoders(nn.Module):
    """The towers; parameters `tower_0`, `tower_1`, ... Fields as in `VisionTransformer`."""

    config: EncodersConfig
    request: FeatureRequest
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, images: Array) -> VisionFeatures:
        """Encodes images [B, S, S, 3] as `VisionTransformer` does.

        Raises:
          ValueError: means of normalized states are asked for (they would mix the towers' channels).
        """
        if self.request.normalized_means:
            raise ValueError("dci.learnable is not defined for fused towers")
        found = []
        for index, tower in enumerate(self.config.towers):

            def at(layers: tuple[int, ...], index: int = index) -> tuple[int, ...]:
                return tuple(self.config.tower_layer(index, layer) for layer in layers)

            request = FeatureRequest(at(self.request.hidden), tuple(map(at, self.request.means)))
            found.append(
                VisionTransformer(
                    tower,
                    request,
                    self.dtype,
                    self.param_dtype,
                    self.remat,
                    self.attention,
                    self.lora,
                    name=f"tower_{index}",
                )(images)
            )
        hidden = {
            layer: _side_by_side([f.hidden[self.config.tower_layer(i, layer)] for i, f in enumerate(found)])
            for layer in self.request.hidden
        }
        means = tuple(_side_by_side(group) for group in zip(*(f.means for f in found), strict=True))
        return VisionFeatures(hidden, means, found[0].grid)


def _side_by_side(states: Any) -> Array:
    return jnp.concatenate(list(states), axis=-1)


def vision_encoder(config: VisionConfig | EncodersConfig, *args: Any, **kwargs: Any) -> nn.Module:
    """The module of a configuration: one tower or several; arguments as in `VisionTransformer`."""
    kind = Encoders if isinstance(config, EncodersConfig) else VisionTransformer
    return kind(config, *args, **kwargs)
