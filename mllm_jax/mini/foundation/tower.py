"""Dense pretraining of the mini vision tower.

Three objectives at once, each a plain supervised loss on rendered images whose content is known:

* long captions: a small cross-attention decoder writes the dense caption (every object with size, color, place
  and text) from the last hidden state;
* dense labels: linear heads on the penultimate hidden state name, for every patch, the shape, color, size,
  digit, word and bar height it shows, in which ninth of the image that is and how many of its kind there are;
* image labels: linear heads on the mean of the last hidden state name scene, lighting, style, quality, topic and
  counts, and heads on every patch of the penultimate one name those of `EVERYWHERE`.

Decoder and heads are thrown away; the blocks are the tower.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.mini.world import GLOBAL_CLASSES, PATCH_CLASSES
from mllm_jax.models.attention import AttentionMask, attend
from mllm_jax.models.layers import Dense, layer_norm
from mllm_jax.models.vit import VisionConfig, VisionTransformer

# Image labels that each single patch has to know as well.
EVERYWHERE = ("scene", "lighting", "style", "quality", "topic", "things", "bars")


@dataclasses.dataclass(frozen=True)
class TowerTask:
    """What is trained: the tower and the throw-away decoder's size."""

    vision: VisionConfig
    vocab: int
    caption_depth: int = 2
    caption_weight: float = 0.5


class CaptionBlock(nn.Module):
    """Causal self-attention, cross-attention to the image, MLP."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Array, image: Array, mask: AttentionMask) -> Array:
        def split(y, name):
            return Dense(self.width, name=name)(y).reshape(*y.shape[:2], self.heads, -1)

        y = layer_norm(1e-6, jnp.float32, jnp.float32, "norm1")(x)
        y = attend(split(y, "q1"), split(y, "k1"), split(y, "v1"), mask)
        x = x + Dense(self.width, name="o1")(y.reshape(x.shape))
        y = layer_norm(1e-6, jnp.float32, jnp.float32, "norm2")(x)
        y = attend(split(y, "q2"), split(image, "k2"), split(image, "v2"))
        x = x + Dense(self.width, name="o2")(y.reshape(x.shape))
        y = layer_norm(1e-6, jnp.float32, jnp.float32, "norm3")(x)
        return x + Dense(self.width, name="fc2")(jax.nn.gelu(Dense(4 * self.width, name="fc1")(y)))


class TowerPretraining(nn.Module):
    """The tower with its three objectives; `__call__` returns logits."""

    task: TowerTask

    @nn.compact
    def __call__(self, images: Array, tokens: Array) -> dict[str, dict[str, Array] | Array]:
        vision = self.task.vision
        depth = vision.depth
        tower = VisionTransformer(vision, FeatureRequest((depth - 1, depth)), name="tower")
        features = tower(images)
        penultimate = layer_norm(vision.eps, jnp.float32, jnp.float32, "dense_norm")(
            features.hidden[depth - 1]
        )
        last = layer_norm(vision.eps, jnp.float32, jnp.float32, "post_norm")(features.hidden[depth])
        patch = {
            key: Dense(len(names), name=f"patch_{key}")(penultimate) for key, names in PATCH_CLASSES.items()
        }
        pooled = last.mean(1)
        whole = {key: Dense(len(names), name=f"image_{key}")(pooled) for key, names in GLOBAL_CLASSES.items()}
        everywhere = {
            key: Dense(len(GLOBAL_CLASSES[key]), name=f"everywhere_{key}")(penultimate) for key in EVERYWHERE
        }

        length = tokens.shape[1]
        table = self.param("words", nn.initializers.normal(0.02), (self.task.vocab, vision.width))
        places = self.param("places", nn.initializers.normal(0.02), (length, vision.width))
        x = table[tokens] + places
        segments = jnp.ones_like(tokens)
        mask = AttentionMask(segments, segments)
        for i in range(self.task.caption_depth):
            x = CaptionBlock(vision.width, vision.heads, name=f"caption_{i}")(x, last, mask)
        x = layer_norm(1e-6, jnp.float32, jnp.float32, "caption_norm")(x)
        return {"patch": patch, "image": whole, "everywhere": everywhere, "caption": x @ table.T}


def tower_loss(task: TowerTask, params, batch) -> tuple[Array, dict[str, Array]]:
    """Weighted sum of the objectives, and their parts.

    Of each kind of patch label, patches that have one and patches that have none weigh the same together: few patches
    show a digit or a word.
    """
    logits = TowerPretraining(task).apply({"params": params}, batch["images"], batch["caption"][:, :-1])
    xent = optax.softmax_cross_entropy_with_integer_labels
    metrics, patch_loss, image_loss, every_loss = {}, 0.0, 0.0, 0.0

    def mean(values, which):
        return (values * which).sum() / jnp.maximum(which.sum(), 1)

    for key, target in batch["patch"].items():
        losses, named = xent(logits["patch"][key], target), target > 0
        patch_loss += 0.5 * (mean(losses, named) + mean(losses, ~named))
        metrics[f"patch_{key}"] = mean(logits["patch"][key].argmax(-1) == target, named)
    for key, target in batch["image"].items():
        image_loss += xent(logits["image"][key], target).mean()
        metrics[f"image_{key}"] = (logits["image"][key].argmax(-1) == target).mean()
    for key, each in logits["everywhere"].items():
        every_loss += xent(each, jnp.broadcast_to(batch["image"][key][:, None], each.shape[:2])).mean()
    targets = batch["caption"][:, 1:]
    valid = (targets != 0).astype(jnp.float32)
    caption_loss = (xent(logits["caption"], targets) * valid).sum() / valid.sum()
    loss = patch_loss + 0.25 * (image_loss + every_loss) + task.caption_weight * caption_loss
    return loss, metrics | {"loss": loss, "caption_loss": caption_loss}


def position_waves(grid: tuple[int, int], width: int) -> Float32[np.ndarray, "positions width"]:
    """Sines and cosines of rows (first half of the features) and columns, float32 [rows * columns, width].

    Wave lengths go geometrically from two patches to four sides of the image, so that both the neighbor and the
    ninth of the image can be read linearly.

    Raises:
      ValueError: `width` is not a multiple of four.
    """
    if width % 4:
        raise ValueError(f"a tower of width {width} has no such table; the width must be a multiple of 4")
    lengths = np.geomspace(2, 4 * max(grid), width // 4)
    halves = []
    for index in np.indices(grid).reshape(2, -1):
        angle = 2 * np.pi * index[:, None] / lengths
        halves += [np.sin(angle), np.cos(angle)]
    return np.concatenate(halves, axis=1).astype(np.float32)


def init_tower(task: TowerTask, caption_length: int, seed: int):
    """Random parameters of tower, decoder and heads, but for the position table, which starts as `position_waves`.

    A random table of the usual 0.02 is lost beneath what the blocks write, and the tower forgets where things are.
    """
    size = task.vision.image_size
    params = TowerPretraining(task).init(
        jax.random.key(seed),
        jnp.zeros((1, size, size, 3), jnp.uint8),
        jnp.zeros((1, caption_length - 1), jnp.int32),
    )["params"]
    params["tower"]["pos_embed"] = jnp.asarray(position_waves(task.vision.grid(size), task.vision.width))
    return params


def index_tree(tree, index: np.ndarray):
    """Rows `index` of every array of a nested dict."""
    return jax.tree.map(lambda array: np.asarray(array[index]), tree)
