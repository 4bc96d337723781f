"""What the encoders give a connector of an image as arrays: what `data.feature_cache` keeps in place of the image.

There is one array [F, N, C] for every grid. The first holds the hidden states and means of the encoder that gives the
tokens, those of all views of a slot one behind the other. Where other encoders' features are mined, each of their maps
follows (F = 1) at its own resolution: the cells that the connector reads are several times as large, and are made of
the maps in the step.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import FeatureRequest, VisionFeatures
from mllm_jax.data.batch import Size
from mllm_jax.models.encoders import Encoder, EncodersConfig, fine_cells

Vision = Encoder | EncodersConfig


def kept_shapes(vision: Vision, request: FeatureRequest, slot: Size) -> tuple[tuple[int, int, int], ...]:
    """`F, N, C` of every array of an image slot of this size; F counts what a connector asks for."""
    states = len(request.hidden) + len(request.means) + len(request.normalized_means)
    tokens = (states, vision.views * math.prod(vision.grid(*slot)), vision.width)
    mined = vision.maps(slot) if vision.mining else ()
    return (tokens, *((1, math.prod(grid), channels) for grid, channels in mined))


def stack(
    features: VisionFeatures, vision: Vision, request: FeatureRequest
) -> tuple[Float[Array, "n _ _ _"], ...]:
    """Of the tokens hidden states, then means, then means of normalized states, in the order of the request."""
    hidden = [features.hidden[layer] for layer in request.hidden]
    states = jnp.stack([*hidden, *features.means, *features.normalized_means])
    states = states.reshape(len(states), -1, vision.views * states.shape[2], states.shape[3])
    maps = features.maps if vision.mining else ()
    return (states.swapaxes(0, 1), *(x.reshape(x.shape[0], 1, -1, x.shape[-1]) for x in maps))


def unstack(
    stacked: Sequence[Float[Array, "n _ _ _"]], vision: Vision, request: FeatureRequest, slot: Size
) -> VisionFeatures:
    """The inverse of `stack`."""
    (tokens, *flat), grid = stacked, vision.grid(*slot)
    states = [x.reshape(-1, math.prod(grid), x.shape[-1]) for x in tokens.swapaxes(0, 1)]
    first, second = len(request.hidden), len(request.hidden) + len(request.means)
    hidden = dict(zip(request.hidden, states[:first], strict=True))
    features = VisionFeatures(hidden, tuple(states[first:second]), grid, tuple(states[second:]))
    if not flat:
        return features
    known = zip(flat, vision.maps(slot), strict=True)
    maps = tuple(x.reshape(x.shape[0], *own, channels) for x, (own, channels) in known)
    return features.replace(fine=fine_cells(vision, slot, maps), maps=maps)
