"""Linear probes of a vision tower: what a linear classifier can read from its frozen features.

Images come from the mini world's `mini` split, whose scenes and handwritten digits no training has seen. Four
questions, each answered by multinomial logistic regression on standardised features:

* attribute: shape and color of a thing, from the mean of the patches that show it;
* digit: the digit on a card, from the mean of its patches;
* count: how many shapes there are, from the mean of all patches;
* position: in which cell of a 3x3 grid the only shape of an image stands, from the mean of all patches.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.mini.world import Scene, render_array, sample_scene
from mllm_jax.mini.world.difficulty import STANDARD, Difficulty
from mllm_jax.mini.world.targets import patch_owners
from mllm_jax.models.vit import VisionConfig, VisionTransformer

BATCH = 64
Features = Callable[[np.ndarray], np.ndarray]  # uint8[n, S, S, 3] -> float[n, P, C]


def tower_features(config: VisionConfig, params: Any, layer: int) -> Features:
    """Patch features hs[layer] of a tower, as a function of images."""
    tower = VisionTransformer(config, FeatureRequest((layer,)))
    encode = jax.jit(lambda images: tower.apply({"params": params}, images).hidden[layer])

    def features(images: np.ndarray) -> np.ndarray:
        padded = np.concatenate([images, np.zeros((-len(images) % BATCH, *images.shape[1:]), np.uint8)])
        parts = [np.asarray(encode(padded[i : i + BATCH]), np.float32) for i in range(0, len(padded), BATCH)]
        return np.concatenate(parts)[: len(images)]

    return features


def pixel_features(patch: int) -> Features:
    """The patches' own pixels: the baseline that any tower has to beat."""

    def features(images: np.ndarray) -> np.ndarray:
        count, side = len(images), images.shape[1] // patch
        patches = images[:, : side * patch, : side * patch].reshape(count, side, patch, side, patch, 3)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(count, side * side, -1).astype(np.float32) / 255

    return features


def pictures(
    count: int, size: int, seed: int = 0, difficulty: Difficulty = STANDARD
) -> tuple[list[Scene], np.ndarray]:
    """Scenes of the held-out split and their images uint8[count, size, size, 3]."""
    scenes = [sample_scene(seed, index, "mini", difficulty) for index in range(count)]
    resize = Image.Resampling.BICUBIC
    images = [Image.fromarray(render_array(scene)).resize((size, size), resize) for scene in scenes]
    return scenes, np.stack([np.asarray(image) for image in images])


def probe(
    features: Features, scenes: list[Scene], images: np.ndarray, grid: int
) -> dict[str, dict[str, float]]:
    """Test accuracy (last fifth of the examples), majority class and number of test examples of every probe."""
    patches = features(images)
    pooled = patches.mean(1)
    examples: dict[str, list[tuple[np.ndarray, Any]]] = {
        name: [] for name in ("attribute_shape", "attribute_color", "digit", "count", "position")
    }
    for scene, patch, whole in zip(scenes, patches, pooled, strict=True):
        owners = patch_owners(scene, grid)
        for number, thing in enumerate(scene.things, start=1):
            if not (owners == number).any():
                continue
            mean = patch[owners == number].mean(0)
            if thing.kind == "shape":
                examples["attribute_shape"].append((mean, thing.shape))
                examples["attribute_color"].append((mean, thing.color))
            elif thing.kind == "digit":
                examples["digit"].append((mean, thing.digit))
        examples["count"].append((whole, len(scene.shapes)))
        if len(scene.shapes) == 1 and len(scene.things) == 1:
            examples["position"].append((whole, scene.shapes[0].position))
    return {name: _accuracy(pairs) for name, pairs in examples.items()}


def _accuracy(pairs: list[tuple[np.ndarray, Any]]) -> dict[str, float]:
    x = np.stack([features for features, _ in pairs])
    y = np.asarray([str(label) for _, label in pairs])
    cut = len(y) * 4 // 5
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a probe cut short is a lower bound
        model.fit(x[:cut], y[:cut])
    values, counts = np.unique(y[:cut], return_counts=True)
    return {
        "accuracy": float((model.predict(x[cut:]) == y[cut:]).mean()),
        "majority": float((y[cut:] == values[counts.argmax()]).mean()),
        "n": len(y) - cut,
    }
