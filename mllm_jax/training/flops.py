"""Model FLOPs of a training step: what the mathematics needs, counted from the configuration and the batch's contents.

The count is linear in what a batch holds: a position, a (query, key) pair, a supervised token and an image each cost
a fixed number of operations. Counted is what is of use: no padding, no empty image slot, of attention only the keys up
to the query in its own segment and window, logits only of supervised tokens, no recomputation (remat), and of the
backward pass only the gradients that something trained needs. MFU divides this by what the devices could do.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax

from mllm_jax.flops import count_flops
from mllm_jax.models import mllm, paths
from mllm_jax.models.encoders import fine_cells
from mllm_jax.models.lora import ADAPTERS
from mllm_jax.models.mllm import ModelConfig, Params

COUNTS = ("tokens", "attention_pairs", "label_tokens", "images")
Leaves = tuple[tuple[str, tuple[int, ...], str], ...]  # path, shape, dtype: a tree that can be hashed


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations per unit of a batch, forward and backward together.

    Attributes:
      token: one position through the LLM's blocks, attention aside.
      pair: one (query, key) pair of attention in all blocks.
      label: one position through the LLM's head.
      image: one image through encoder and connector.
      forward: the share of each that is the forward pass, by the names of `COUNTS`.
    """

    token: int | float
    pair: int | float
    label: int | float
    image: int | float
    forward: Mapping[str, int | float]

    def __call__(self, counts: Mapping[str, int | float]) -> int | float:
        """Operations of steps with these `COUNTS` (as in the step's metrics)."""
        per_unit = (self.token, self.pair, self.label, self.image)
        return sum(each * counts[name] for each, name in zip(per_unit, COUNTS, strict=True))

    def forward_flops(self, counts: Mapping[str, int | float]) -> int | float:
        """Operations of the forward pass alone."""
        return sum(self.forward[name] * counts[name] for name in COUNTS)


def step_flops(
    model: ModelConfig, trained: Params, frozen: Params, cached_features: bool = False
) -> StepFlops:
    """Counts the operations of a stage.

    Args:
      model: with the stage's adapters.
      trained, frozen: shapes of the parameters that the stage trains and of the others, adapters included.
      cached_features: the encoders are not run.
    """
    flat, learned = paths.flatten(paths.merge(trained, frozen)), paths.flatten(trained)
    encoder = any(path.startswith("vision/") for path in learned)
    connector = any(path.startswith("connector/") for path in learned)
    body = encoder or connector or any(re.match(r"llm/(blocks/|embedding)", path) for path in learned)
    head_path = "llm/embedding" if model.llm.tied else "llm/head"

    token = [0, 0]
    for path, leaf in flat.items():
        if re.fullmatch(rf"llm/blocks/.*/kernel|llm/{ADAPTERS}", path):
            token[0] += 2 * leaf.size
            token[1] += 2 * leaf.size * (body + (path in learned))
    heads = model.llm.depth * model.llm.heads * model.llm.head_width
    head = 2 * flat[head_path].size
    before_head = body or "llm/final_norm/scale" in learned
    image = _image_flops(
        model, _leaves(trained, "vision"), _leaves(frozen, "vision"), connector, cached_features
    )
    return StepFlops(
        token=sum(token),
        pair=4 * heads * (3 if body else 1),
        label=head * (1 + before_head + (head_path in learned)),
        image=image[1],
        forward=dict(zip(COUNTS, (token[0], 4 * heads, head, image[0]), strict=True)),
    )


def _leaves(tree: Params, part: str) -> Leaves:
    return tuple(
        (path, leaf.shape, leaf.dtype.name) for path, leaf in paths.flatten(tree.get(part, {})).items()
    )


@functools.lru_cache(maxsize=64)  # a search over meshes asks often, and tracing an encoder takes a second
def _image_flops(
    model: ModelConfig, trained: Leaves, frozen: Leaves, connector: bool, cached: bool
) -> tuple[int, int]:
    """(forward, with gradients) of encoder and connector for one image.

    Args:
      trained, frozen: of the encoder.
    """
    module, grid, encoder = model.make_connector(), model.vision_spec.grid, bool(trained)
    forward = both = module.flops(grid) * model.vision.views
    if encoder or connector:
        both = module.flops(grid, params=connector, features=encoder) * model.vision.views
    seen = _cells_flops(model) if cached else _encoder_flops(model, (), trained + frozen)
    forward += seen
    both += _encoder_flops(model, trained, frozen) if encoder and not cached else seen
    return forward, both


def _cells_flops(model: ModelConfig) -> int:
    """Of making the cells that are mined of cached maps."""
    vision, slot = model.vision, model.slot_size
    if not vision.mining:
        return 0
    maps = [jax.ShapeDtypeStruct((1, *grid, width), model.dtype) for grid, width in vision.maps(slot)]
    return count_flops(lambda *maps: fine_cells(vision, slot, maps), *maps)


def _encoder_flops(model: ModelConfig, trained: Leaves, frozen: Leaves) -> int:
    model = dataclasses.replace(model, remat="none", vision_remat="none", attention="xla")
    image = jax.ShapeDtypeStruct((1, *model.slot_size, 3), "uint8")
    learned, kept = (
        paths.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in leaves})
        for leaves in (trained, frozen)
    )

    def features(learned: Params, kept: Params, image: Any) -> Any:
        params = {"vision": paths.merge(learned, kept)}
        return mllm.apply(model, params, image, method=lambda module, image: module.vision(image))

    def with_gradients(learned: Params, kept: Params, image: Any) -> Any:
        out, pull = jax.vjp(lambda each: features(each, kept, image), learned)
        return pull(out)

    return count_flops(with_gradients if trained else features, learned, kept, image)


@functools.lru_cache(maxsize=64)
def mean_attention_pairs(windows: tuple[int, ...], length: int) -> float:
    """(query, key) pairs of one segment of `length` tokens, averaged over blocks with these windows (0 = none)."""
    pairs = [
        length * (length + 1) / 2
        - (max(length - window, 0) * (max(length - window, 0) + 1) / 2 if window else 0)
        for window in windows
    ]
    return sum(pairs) / len(pairs)


def batch_counts(
    model: ModelConfig, samples: int, length: int, labels: int, images: int | float
) -> dict[str, int | float]:
    """`COUNTS` of a batch of equal samples.

    Args:
      samples: in the batch; length: tokens of each, visual ones included; labels: supervised tokens of each.
      images: of each.
    """
    return {
        "tokens": float(samples * length),
        "attention_pairs": samples * mean_attention_pairs(model.llm.block_windows, length),
        "label_tokens": float(samples * labels),
        "images": float(samples * images),
    }
