"""Dense pretraining of the mini vision tower.

Two objectives at once, plain supervised losses on rendered images whose content is known:

* dense labels: linear heads on the penultimate hidden state name, for every patch, the shape, color, size,
  digit, word and bar height it shows, in which ninth of the image that is and how many of its kind there are;
* image labels: linear heads on the mean of the last hidden state name scene, lighting, style, quality, topic and
  counts, and heads on every patch of the penultimate one name those of `EVERYWHERE`; a head on the mean of the
  penultimate one names the ninth of the image that its only thing is in.

The heads are thrown away; the blocks are the tower.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.mini.foundation.pictures import POOLED
from mllm_jax.mini.world import GLOBAL_CLASSES, PATCH_CLASSES
from mllm_jax.models.layers import Dense, layer_norm
from mllm_jax.models.vit import VisionConfig, VisionTransformer

# Image labels that each single patch has to know as well.
EVERYWHERE = ("scene", "lighting", "style", "quality", "topic", "things", "bars")


class TowerPretraining(nn.Module):
    """The tower with the heads of its objectives; `__call__` returns logits."""

    vision: VisionConfig

    @nn.compact
    def __call__(self, images: Array) -> dict[str, dict[str, Array]]:
        vision, depth = self.vision, self.vision.depth
        features = VisionTransformer(vision, FeatureRequest((depth - 1, depth)), name="tower")(images)
        penultimate = layer_norm(vision.eps, jnp.float32, jnp.float32, "dense_norm")(
            features.hidden[depth - 1]
        )
        last = layer_norm(vision.eps, jnp.float32, jnp.float32, "post_norm")(features.hidden[depth])

        def heads(kind: str, names: Sequence[str], x: Array) -> dict[str, Array]:
            sizes = [len((PATCH_CLASSES | GLOBAL_CLASSES)[key]) for key in names]
            logits = Dense(sum(sizes), name=kind)(x)  # one product; many small ones take a quarter of a step
            return dict(zip(names, jnp.split(logits, np.cumsum(sizes)[:-1], axis=-1), strict=True))

        return {
            "patch": heads("patch", tuple(PATCH_CLASSES), penultimate),
            "image": heads("image", tuple(k for k in GLOBAL_CLASSES if k not in POOLED), last.mean(1)),
            "pooled": heads("pooled", POOLED, penultimate.mean(1)),
            "everywhere": heads("everywhere", EVERYWHERE, penultimate),
        }


def tower_loss(vision: VisionConfig, params, batch) -> tuple[Array, dict[str, Array]]:
    """Weighted sum of the objectives, and their parts.

    Of each kind of patch label, patches that have one and patches that have none weigh the same together: few patches
    show a digit or a word. `batch["emphasis"]` has the weight of each kind, and of what the mean of the patches tells.
    """
    logits = TowerPretraining(vision).apply({"params": params}, batch["images"])
    xent = optax.softmax_cross_entropy_with_integer_labels
    metrics, patch_loss, image_loss, pooled_loss, every_loss = {}, 0.0, 0.0, 0.0, 0.0

    def mean(values, which):
        return (values * which).sum() / jnp.maximum(which.sum(), 1)

    for key, target in batch["patch"].items():
        losses, named = xent(logits["patch"][key], target), target > 0
        patch_loss += batch["emphasis"][key] * 0.5 * (mean(losses, named) + mean(losses, ~named))
        metrics[f"patch_{key}"] = mean(logits["patch"][key].argmax(-1) == target, named)
    for key, each in logits["image"].items():
        target = batch["image"][key]
        image_loss += xent(each, target).mean()
        metrics[f"image_{key}"] = (each.argmax(-1) == target).mean()
    for key, each in logits["pooled"].items():
        target = batch["image"][key]
        named = target > 0
        pooled_loss += batch["emphasis"][key] * mean(xent(each, target), named)
        metrics[f"image_{key}"] = mean(each.argmax(-1) == target, named)
    for key, each in logits["everywhere"].items():
        every_loss += xent(each, jnp.broadcast_to(batch["image"][key][:, None], each.shape[:2])).mean()
    loss = patch_loss + pooled_loss + 0.25 * (image_loss + every_loss)
    return loss, metrics | {"loss": loss, "patch_loss": patch_loss}


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


POSITION_SCALE = 1.5  # of the position table at the start, so that it outweighs what the patches show
LOCAL_SCALE = (
    1.5  # of queries and keys at the start: the neighbor gets e^2 times the weight of the next patch
)
# (rows, columns) from a patch to the one that each head of the first blocks looks at when training starts
NEIGHBORS = (
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-2, 0), (2, 0), (0, -2), (0, 2)),
)


def neighbor_kernels(
    width: int, head_width: int, grid: int, offset: tuple[int, int]
) -> tuple[Float32[np.ndarray, "C h"], Float32[np.ndarray, "C h"]]:
    """Query and key kernels of a head that attends to the patch at `offset` from each patch.

    The product of a query and a key is the sum of cos(2 pi (distance - offset) / length) over some wave lengths of
    `position_waves`, for rows and for columns.

    Returns:
      float32 [width, head_width] each.
    """
    waves = width // 4
    lengths = np.geomspace(2, 4 * grid, waves)
    usable = np.flatnonzero((lengths > 2.5) & (lengths < 2 * grid))
    chosen = usable[np.linspace(0, len(usable) - 1, head_width // 4).round().astype(int)]
    query, key = np.zeros((2, width, head_width), np.float32)
    column = 0
    for axis, step in enumerate(offset):
        for wave in chosen:
            sine, cosine = 2 * axis * waves + wave, (2 * axis + 1) * waves + wave
            turn = 2 * np.pi * step / lengths[wave]
            query[sine, column] = query[cosine, column + 1] = 1
            # sin(a - turn) and cos(a - turn) of the key's own angle a
            key[sine, column], key[cosine, column] = np.cos(turn), -np.sin(turn)
            key[sine, column + 1], key[cosine, column + 1] = np.sin(turn), np.cos(turn)
            column += 2
    return query, key


def init_tower(vision: VisionConfig, seed: int):
    """Random parameters of tower and heads, but for positions and the first blocks' queries and keys.

    The position table starts as `position_waves`: a random table of the usual 0.02 is lost beneath what the blocks
    write, and the tower forgets where things are. The heads of the first blocks start by looking at one neighbor each,
    as a convolution does, since a glyph is read from several patches (structured initialization as in Trockman and
    Kolter 2023 and Zheng et al. 2024).
    """
    size = vision.image_size
    empty = jnp.zeros((1, size, size, 3), jnp.uint8)
    params = TowerPretraining(vision).init(jax.random.key(seed), empty)["params"]
    grid = vision.grid(size)
    params["tower"]["pos_embed"] = jnp.asarray(POSITION_SCALE * position_waves(grid, vision.width))
    blocks, head_width = params["tower"]["blocks"], vision.width // vision.heads
    for depth, offsets in enumerate(NEIGHBORS[: vision.depth]):
        for head, offset in enumerate(offsets[: vision.heads]):
            columns = slice(head * head_width, (head + 1) * head_width)
            kernels = neighbor_kernels(vision.width, head_width, grid[0], offset)
            for name, kernel in zip("qk", kernels, strict=True):
                whole = blocks[name]["kernel"]
                blocks[name]["kernel"] = whole.at[depth, :, columns].set(LOCAL_SCALE * kernel)
    return params
