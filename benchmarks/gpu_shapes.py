"""The shapes that both sides of gpu.py run: LLaVA-1.5-7B's, or small ones; rows like the training data's."""

import dataclasses

import numpy as np
from packing import llava_like

from mllm_jax.data.packing import RowLimits, pack


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of a stage: `rows` of `length` tokens with room for `slots` images and `labels` supervised tokens."""

    rows: int
    length: int
    slots: int
    labels: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Geometry of a model (as in the `config.json` of its parts) and what is measured of it."""

    vision: dict
    llm: dict
    stages: dict[str, Shape]
    batches: tuple[int, ...]
    prompt: int  # text tokens
    new_tokens: int
    matrix: int
    steps: int  # timed, after those that warm up
    depths: tuple[int, ...]  # LLM layers, the first that fits

    @property
    def visual(self) -> int:
        """Visual tokens of an image."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _vision(width: int, depth: int, heads: int, mlp: int, size: int) -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "patch_size": 14,
        "image_size": size,
    }


def _llm(vocab: int, width: int, depth: int, heads: int, mlp: int) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 4096,
    }


LLAVA = Shapes(
    vision=_vision(1024, 24, 16, 4096, 336),
    llm=_llm(32064, 4096, 32, 32, 11008),  # 32,000 words and what transformers' layout adds
    stages={"pretrain": Shape(4, 2560, 4, 512), "finetune": Shape(2, 4096, 5, 2048)},
    batches=(1, 8, 64),
    prompt=40,
    new_tokens=128,
    matrix=8192,
    steps=10,
    depths=(32, 24, 16, 8),
)
TINY = Shapes(
    vision=_vision(32, 2, 2, 64, 56),
    llm=_llm(320, 64, 2, 4, 128),
    stages={"pretrain": Shape(2, 128, 4, 64), "finetune": Shape(2, 128, 4, 64)},
    batches=(2,),
    prompt=8,
    new_tokens=4,
    matrix=128,
    steps=2,
    depths=(2, 1),
)


def lengths(stage: str, count: int, visual: int, tiny: bool) -> np.ndarray:
    """int[count, 4], what samples like a stage's need of a row (`packing.RESOURCES`)."""
    if stage == "finetune" and not tiny:
        return llava_like(count, visual)
    rng = np.random.default_rng(0)
    text = rng.integers(20, 60, count) if not tiny else rng.integers(4, 40, count)
    ones = np.ones(count, int)
    return np.stack([text + visual, ones, text - 2, ones], axis=1)


def packed_rows(stage: str, shapes: Shapes) -> list[list[np.ndarray]]:
    """The samples (rows of `lengths`) of each row of one batch, as the packing plan fills it."""
    shape = shapes.stages[stage]
    sizes = lengths(stage, 256, shapes.visual, shapes is TINY)
    limits = RowLimits(shape.length, shape.slots, shape.labels, 64)
    rows = pack(sizes, limits, np.random.default_rng(0))
    return [[sizes[sample] for sample in row] for row in rows[: shape.rows]]


def fused_multiply_adds(shapes: Shapes) -> dict[str, float]:
    """Weights that a token is multiplied with: of the LLM's layers (one), its head, the tower and the connector."""
    llm, vision = shapes.llm, shapes.vision
    width, channels = llm["hidden_size"], vision["hidden_size"]
    return {
        "layer": 4 * width**2 + 3 * width * llm["intermediate_size"],
        "head": width * llm["vocab_size"],
        "tower": (vision["num_hidden_layers"] - 1)  # the last block's output is not used
        * (4 * channels**2 + 2 * channels * vision["intermediate_size"])
        + 3 * vision["patch_size"] ** 2 * channels,
        "connector": channels * width + width**2,
    }


def model_flops(stage: str, shapes: Shapes, layers: int, segments: list[np.ndarray], trained: bool) -> float:
    """Floating-point operations that one step of a batch needs.

    Args:
      segments: what each sample of the batch needs of a row.
      trained: whether the LLM's weights have gradients.
    """
    parts = fused_multiply_adds(shapes)
    tokens, images, labels, _ = np.sum(segments, axis=0)
    squares = sum(float(sample[0]) ** 2 for sample in segments)
    times = 6 if trained else 4  # forward, gradient of activations, gradient of weights: 2 each
    width, channels, patches = shapes.llm["hidden_size"], shapes.vision["hidden_size"], shapes.visual + 1
    attention = 2 * width * squares  # causal: half of q k and of the weighted sum, 2 operations each
    llm = layers * (times * parts["layer"] * tokens + 3 * attention) + times * parts["head"] * labels
    tower_attention = (shapes.vision["num_hidden_layers"] - 1) * 4 * channels * patches**2
    tower = images * (2 * parts["tower"] * patches + tower_attention)
    return float(llm + tower + 6 * parts["connector"] * images * shapes.visual)
