"""What a tower gives a connector as one array, for keeping it (`data.feature_cache`) instead of the images."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.connectors.base import FeatureRequest, Grid, VisionFeatures


def num_features(request: FeatureRequest) -> int:
    """F: hidden states and group means that a connector asks for."""
    return len(request.hidden) + len(request.means) + len(request.normalized_means)


def stack(features: VisionFeatures, request: FeatureRequest) -> Float[Array, "B F N C"]:
    """Hidden states, then means, then means of normalized states, each in the order of the request."""
    hidden = [features.hidden[layer] for layer in request.hidden]
    return jnp.stack([*hidden, *features.means, *features.normalized_means], axis=1)


def unstack(stacked: Float[Array, "B F N C"], request: FeatureRequest, grid: Grid) -> VisionFeatures:
    """The inverse of `stack`."""
    parts = [stacked[:, index] for index in range(stacked.shape[1])]
    first, second = len(request.hidden), len(request.hidden) + len(request.means)
    hidden = dict(zip(request.hidden, parts[:first], strict=True))
    return VisionFeatures(hidden, tuple(parts[first:second]), grid, tuple(parts[second:]))
