"""Several vision encoders, each with its own input size and patch grid, and the ways to use them as one.

The first encoder gives the tokens. An image slot holds the image at the size of the largest input; the input of every
other encoder is made of it on the device, bilinearly with half-pixel centres and without antialiasing, as Mini-Gemini
makes CLIP's 336 pixels of ConvNeXt's 768.

* `channels`: hidden states side by side on the channel axis (SigLIP + DINOv2). Encoders of different depth are
  aligned at their ends: hs[-1-k] of the whole is hs[-1-k] of every one, so that `select_layer=-2` takes the penultimate
  block of each. All must cut their input into the same grid.
* `tokens`: the tokens of one behind those of the other, aligned likewise, through one connector that treats each patch
  alone. All must have one width (CLIP-L + DINOv2-L); grids may differ.
* `mining...`: the others give fine features, several for each token of the first, and the connector mines them
  (`connectors.mining`). What is mined where a connector reads more than F is said by `MINING`.

With `split`, the first of mined encoders sees the image in `split` x `split` parts, each at its own input size, and
with `overview` the whole image at that size before them: the views of a slot, whose tokens follow each other
(Mini-Gemini-HD).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import FeatureRequest, Grid, VisionFeatures
from mllm_jax.connectors.grids import joined_maps, resize_grid
from mllm_jax.data.batch import Size
from mllm_jax.models.convnext import ConvNext, ConvNextConfig
from mllm_jax.models.lora import LoRA
from mllm_jax.models.vit import VisionConfig, VisionTransformer, normalize_pixels

Encoder = VisionConfig | ConvNextConfig
MODULES: dict[type, type[nn.Module]] = {VisionConfig: VisionTransformer, ConvNextConfig: ConvNext}
# How encoders are combined -> `VisionSpec.mining`.
MINING = {
    "channels": "",
    "tokens": "",
    "mining": "selected",
    "mining_all": "all",
    "mining_channels": "channels",
}


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """Encoders, the first of which gives the tokens.

    Attributes:
      towers: at least two.
      image_sizes: side of each one's input in pixels; () = all see the slot as it is.
      combine: a key of `MINING`.
      split: parts per side that the first encoder sees the image in.
      overview: it also sees the whole image, before the parts.
    """

    towers: tuple[Encoder, ...]
    image_sizes: tuple[int, ...] = ()
    combine: str = "channels"
    split: int = 1
    overview: bool = False

    def __post_init__(self):
        if self.combine not in MINING:
            raise ValueError(f"vision.combine={self.combine!r}; valid: {', '.join(MINING)}")
        if self.image_sizes and len(self.image_sizes) != len(self.towers):
            raise ValueError(
                f"vision.image_sizes={self.image_sizes} must give one size for each of {len(self.towers)} encoders"
            )
        if self.split > 1 and not (self.mining and self.image_sizes):
            raise ValueError(
                f"vision.split={self.split} needs vision.image_sizes, and a vision.combine that mines "
                f"({', '.join(name for name, mined in MINING.items() if mined)})"
            )
        if self.overview and self.split == 1:
            raise ValueError("vision.overview=True needs vision.split > 1")

    @property
    def mining(self) -> str:
        """How fine features are mined into coarse ones; see `connectors.base.VisionSpec`."""
        return MINING[self.combine]

    @property
    def views(self) -> int:
        """Images that one image slot is seen as."""
        return self.split**2 + self.overview

    @property
    def width(self) -> int:
        """C: channels of the features."""
        return (
            sum(tower.width for tower in self.towers) if self.combine == "channels" else self.towers[0].width
        )

    @property
    def regular(self) -> bool:
        """Whether the tokens lie on one grid."""
        return self.combine != "tokens"

    @property
    def depth(self) -> int:
        """Blocks of the shallowest encoder, or of the first one where the others are mined."""
        return self.towers[0].depth if self.mining else min(tower.depth for tower in self.towers)

    @property
    def patch(self) -> int:
        """Pixels per patch side of the first encoder."""
        return self.towers[0].patch

    @property
    def image_size(self) -> int:
        """Pixels per side that the first encoder was trained for."""
        return self.towers[0].image_size

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the first encoder."""
        return self.towers[0].mean

    @property
    def std(self) -> tuple[float, float, float]:
        """Of the first encoder."""
        return self.towers[0].std

    @property
    def title(self) -> str:
        """What reports call them."""
        return " + ".join(tower.title for tower in self.towers)

    def inputs(self, slot: Size) -> tuple[tuple[Encoder, Size], ...]:
        """Every encoder with the height and width of its input, for image slots of `slot` pixels."""
        sizes = [(size, size) for size in self.image_sizes] or [slot] * len(self.towers)
        return tuple(zip(self.towers, sizes, strict=True))

    def grid(self, height: int, width: int | None = None) -> Grid:
        """Patch grid of the first encoder, for image slots of this size; one row of all tokens with `tokens`.

        Raises:
          ValueError: the encoders' grids cannot be combined, or the slot is not of the largest size.
        """
        slot = (height, height if width is None else width)
        largest = max((self.image_sizes[0] * self.split, *self.image_sizes[1:])) if self.image_sizes else 0
        if self.image_sizes and slot != (largest, largest):
            what = "" if self.split == 1 else f", the first of them {self.split} times"
            raise ValueError(
                f"vision.image_size={height if width is None else slot} must be the largest of vision.image_sizes="
                f"{self.image_sizes}{what}: {largest}"
            )
        grids = [tower.grid(*size) for tower, size in self.inputs(slot)]
        found = ", ".join(
            f"{grid} with patches of {tower.patch}" for tower, grid in zip(self.towers, grids, strict=True)
        )
        if self.mining:
            rows, columns = (side * self.split for side in grids[0])
            for fine in grids[1:]:
                if (
                    fine != grids[1]
                    or fine[0] % rows
                    or fine[1] % columns
                    or fine[0] // rows != fine[1] // columns
                ):
                    raise ValueError(
                        f"vision.image_size={height if width is None else slot}: no whole number of fine features per "
                        f"token ({found}); choose vision.image_sizes whose grids divide each other"
                    )
        elif self.combine == "tokens":
            if len({tower.width for tower in self.towers}) > 1:
                raise ValueError(
                    f"vision.combine='tokens': one connector follows encoders of one width, not of "
                    f"{', '.join(str(tower.width) for tower in self.towers)} channels ({self.title})"
                )
            return (1, sum(rows * columns for rows, columns in grids))
        elif len(set(grids)) > 1:
            raise ValueError(
                f"vision.image_size={height if width is None else slot}: encoders side by side on channels have "
                f"different patch grids ({found}); choose towers with one patch size, or vision.image_sizes that give "
                "one grid"
            )
        return grids[0]

    def fine(self, slot: Size) -> tuple[int, int]:
        """Fine features of each token's cell, and their channels; (0, 0) where nothing is mined."""
        if not self.mining:
            return (0, 0)
        (first, size), *others = self.inputs(slot)
        (tower, own), rows = others[0], first.grid(*size)[0]
        side = tower.grid(*own)[0] // (rows * self.split)
        return (side * side, sum(tower.width for tower, _ in others))

    def maps(self, slot: Size) -> tuple[tuple[Grid, int], ...]:
        """Grid and channels of every map of the encoders behind the first, for image slots of this size."""
        return tuple(one for tower, size in self.inputs(slot)[1:] for one in tower.maps(size))

    def resolve_layer(self, layer: int) -> int:
        """0..L for a hidden-state index that may be negative; see `VisionConfig.resolve_layer`."""
        return self.towers[0].with_depth(self.depth).resolve_layer(layer)

    def tower_layer(self, tower: int, layer: int) -> int:
        """The index in a tower of the hidden state that belongs to hs[layer] of the whole."""
        if self.mining:
            return layer if tower == 0 else self.towers[tower].fine_layer
        return self.towers[tower].depth - self.depth + layer


class Encoders(nn.Module):
    """The encoders; parameters `tower_0`, `tower_1`, ... Fields as in `VisionTransformer`."""

    config: EncodersConfig
    request: FeatureRequest
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, images: Array) -> VisionFeatures:
        """Encodes images [B, H, W, 3] as `VisionTransformer` does; of every image its views, one after the other.

        Raises:
          ValueError: means of normalised states are asked for, where they would mix the towers' channels.
        """
        if self.config.mining:
            return self._with_fine_features(images)
        if self.request.normalized_means and self.config.regular:
            raise ValueError("dci.learnable is not defined for encoders side by side on channels")
        inputs = self.config.inputs(images.shape[1:3])
        found = []
        for index, (tower, size) in enumerate(inputs):

            def at(layers: tuple[int, ...], index: int = index) -> tuple[int, ...]:
                return tuple(self.config.tower_layer(index, layer) for layer in layers)

            groups = (tuple(map(at, each)) for each in (self.request.means, self.request.normalized_means))
            request = FeatureRequest(at(self.request.hidden), *groups)
            found.append(self._tower(index, request)(resized(images, size, tower)))

        def joined(states: Any) -> Array:
            return jnp.concatenate(list(states), axis=-1 if self.config.regular else 1)

        hidden = {
            layer: joined([f.hidden[self.config.tower_layer(i, layer)] for i, f in enumerate(found)])
            for layer in self.request.hidden
        }
        means = tuple(map(joined, zip(*(f.means for f in found), strict=True)))
        normalized = tuple(map(joined, zip(*(f.normalized_means for f in found), strict=True)))
        return VisionFeatures(hidden, means, self.config.grid(*images.shape[1:3]), normalized)

    def _tower(self, index: int, request: FeatureRequest) -> nn.Module:
        kinds = (self.dtype, self.param_dtype, self.remat, self.attention, self.lora)
        return vision_encoder(self.config.towers[index], request, *kinds, name=f"tower_{index}")

    def _with_fine_features(self, images: Array) -> VisionFeatures:
        (first, size), *others = self.config.inputs(images.shape[1:3])
        split, overview = self.config.split, self.config.overview
        whole = resized(images, (size[0] * split, size[1] * split), first)
        views = _tiles(whole, split)
        if overview:  # of pixels that are numbers: rounding to uint8 once more would be seen
            whole = normalize_pixels(whole, first.mean, first.std)
            views = jnp.concatenate([_resized(whole, size)[:, None], _tiles(whole, split)], axis=1)
        coarse = self._tower(0, self.request)(views.reshape(-1, *views.shape[2:]))
        maps: list[Array] = []
        for index, (tower, own) in enumerate(others, 1):
            request = FeatureRequest(hidden=(tower.fine_layer,))
            found = self._tower(index, request)(resized(images, own, tower))
            alone = found.hidden[tower.fine_layer].reshape(images.shape[0], *found.grid, -1)
            maps += found.maps or (alone,)
        return coarse.replace(fine=fine_cells(self.config, images.shape[1:3], maps), maps=tuple(maps))


def fine_cells(
    config: EncodersConfig, slot: Size, maps: Sequence[Float[Array, "b _ _ _"]]
) -> Float[Array, "B N P A"]:
    """The fine features of every token's cell, of all views, made of the maps of the encoders behind the first.

    Args:
      slot: height and width of an image slot.
      maps: as `EncodersConfig.maps` lists them.
    """
    (first, size), (tower, own), *_ = config.inputs(slot)
    fine = joined_maps(maps, tower.grid(*own))
    views = _tiles(fine, config.split)
    if config.overview:
        views = jnp.concatenate([_resized(fine, views.shape[2:4])[:, None], views], axis=1)
    return _cells(views.reshape(-1, *views.shape[2:]), first.grid(*size))


def resized(images: Array, size: Size, tower: Encoder) -> Array:
    """Pixels [B, H, W, 3] at the size of an encoder's input: as they are, or normalised and in float32."""
    if images.shape[1:3] == size:
        return images
    return _resized(normalize_pixels(images, tower.mean, tower.std), size)


def _resized(x: Float[Array, "B h w C"], size: Size) -> Float[Array, "B y x C"]:
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return resize_grid(flat, x.shape[1:3], size).reshape(x.shape[0], *size, -1)


def _tiles(x: Float[Array, "B h w C"], split: int) -> Float[Array, "B s y x C"]:
    """The parts of a map, row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, split, height // split, split, width // split, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, split * split, height // split, width // split, channels)


def _cells(x: Float[Array, "B h w C"], grid: Grid) -> Float[Array, "B N P C"]:
    """The positions that lie in each cell of a coarser grid, both row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, grid[0], height // grid[0], grid[1], width // grid[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid[0] * grid[1], -1, channels)


def vision_encoder(config: Encoder | EncodersConfig, *args: Any, **kwargs: Any) -> nn.Module:
    """The module of a configuration: one encoder or several; arguments as in `VisionTransformer`."""
    return MODULES.get(type(config), Encoders)(config, *args, **kwargs)
