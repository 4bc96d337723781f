"""A LLaVA-1.5 of 18 M parameters with random weights, and samples for it: what training is timed on.

Both sides of a comparison read the same checkpoint, in transformers' layout, and the same samples.
"""

from typing import NamedTuple

import numpy as np
from packing import llava_like

VISUAL, LENGTH, SIDE = 144, 512, 84  # visual tokens of an image, most tokens of a sample, pixels a side
WORDS, IMAGE = 4096, 4095
VISION = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024,
          "image_size": SIDE, "patch_size": 7}  # fmt: skip
TEXT = {"vocab_size": WORDS, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 6, "intermediate_size": 1024, "max_position_embeddings": 4096}  # fmt: skip


class Sample(NamedTuple):
    """Token ids, `IMAGE` at visual tokens; which are supervised; uint8[SIDE, SIDE, 3], if there is an image."""

    tokens: np.ndarray
    supervised: np.ndarray
    image: np.ndarray | None


def make_checkpoint(directory: str) -> None:
    """Writes the model with transformers (needs torch)."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=VISUAL,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(directory)


def fixed_samples(count: int) -> list[Sample]:
    """Samples of `LENGTH` tokens, `VISUAL` of them visual; half of the text is supervised."""
    return _make([(LENGTH - VISUAL, 1)] * count)


def llava_like_samples(count: int) -> list[Sample]:
    """Lengths of LLaVA-665k's mixture (packing.py) at a quarter: 144 for 576 visual tokens, 512 for 2,048 in all."""
    scale = 576 // VISUAL
    return _make([((total - 576 * images) // scale, images) for total, images, *_ in llava_like(count)])


def _make(sizes: list[tuple[int, int]]) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for text, images in sizes:
        tokens = rng.integers(3, IMAGE, VISUAL * images + text)
        tokens[1 : 1 + VISUAL * images] = IMAGE
        supervised = np.arange(len(tokens)) >= len(tokens) - max(1, text // 2)
        image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) if images else None
        found.append(Sample(tokens, supervised, image))
    return found
