"""A model as evaluation needs it: parameters and what turns pictures and words into input."""

import dataclasses
import functools
import hashlib
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from mllm_jax.data.batch import Size
from mllm_jax.data.images import MAX_PIXELS, decode_image
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.models.mllm import ModelConfig, Params

_SAMPLED = 1 << 16  # elements of each parameter that enter the fingerprint


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model that can be asked.

    Attributes:
      config: the computation.
      params: its parameters, placed wherever they are to be used.
      tokenizer: a Hugging Face tokenizer.
      processor: brings pictures to the model's size.
      template: name of the conversation template the model was trained with.
      compat: None or "llava": how unusual image files are decoded (see `data.images`).
      max_image_pixels: larger images are refused.

    Raises:
      ValueError: processor or tokenizer do not fit the configuration.
    """

    config: ModelConfig
    params: Params
    tokenizer: Any
    processor: ImageProcessor
    template: str
    compat: Literal["llava"] | None = None
    max_image_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.processor.size != self.config.image_size:
            raise ValueError(
                f"the image processor makes pictures of {self.processor.size} px, "
                f"model.image_size is {self.config.image_size}"
            )
        ours = np.asarray((self.processor.mean, self.processor.std))
        towers = np.asarray((self.config.vision.mean, self.config.vision.std))
        if not np.allclose(ours, towers, atol=1e-6):
            raise ValueError(
                f"the image processor's mean and std {ours.tolist()} are not the vision tower's "
                f"{towers.tolist()}"
            )
        # transformers' LLaVA layout adds this token to mark places of pictures; no text of ours becomes it.
        extra = self.tokenizer.get_added_vocab().get("<image>", -1) == self.config.llm.vocab
        if len(self.tokenizer) - extra > self.config.llm.vocab:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, more than the LLM's vocabulary of "
                f"{self.config.llm.vocab}"
            )

    def picture(self, data: bytes, source: str) -> UInt8[np.ndarray, "S S 3"]:
        """An encoded image as the model takes it.

        Raises:
          ImageError: it cannot be used; names `source`.
        """
        return self.processor(self._decode(data, source))

    def image_size(self, data: bytes, source: str) -> Size:
        """Height and width of an encoded image in pixels.

        Raises:
          ImageError: it cannot be used; names `source`.
        """
        height, width = self._decode(data, source).shape[:2]
        return height, width

    def _decode(self, data: bytes, source: str) -> UInt8[np.ndarray, "h w 3"]:
        return decode_image(data, source=source, compat=self.compat, max_pixels=self.max_image_pixels)

    def blind_picture(self) -> UInt8[np.ndarray, "S S 3"]:
        """What a blind model is shown: the mean colour everywhere, zero after normalisation (to 1/255)."""
        side = self.processor.size
        return np.broadcast_to(np.asarray(self.processor.fill, np.uint8), (side, side, 3))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of what decides answers: configuration, parameter values, tokenizer, pictures, template.

        Of each parameter evenly spaced elements are read (all of them up to 65,536), so that it is cheap for
        large models too. How the computation is arranged (remat, attention implementation) does not enter.
        """
        digest = hashlib.sha256()
        same = {"remat", "vision_remat", "attention"}
        fields = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        digest.update(repr(sorted((k, v) for k, v in fields.items() if k not in same)).encode())
        digest.update(repr((self.processor, self.compat, self.template, len(self.tokenizer))).encode())
        probe = "The quick brown fox, 12 + 7 = 19? <image>\n"
        digest.update(repr(self.tokenizer(probe).input_ids).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
            digest.update(sampled(leaf).tobytes())
        return digest.hexdigest()[:16]


def sampled(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """Evenly spaced elements of a parameter in their order, on the host; all if they are few.

    A parameter split over several hosts (`mesh.fsdp`) is sampled on its devices, by all processes together.
    """
    step = max(1, leaf.size // _SAMPLED)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        few = jax.jit(lambda values: values.reshape(-1)[::step])(leaf)
        return np.asarray(multihost_utils.process_allgather(few, tiled=True))
    return np.asarray(leaf.reshape(-1)[::step])
