"""Prompts one by one; what was computed about images is kept, for a conversation asks about the same ones again."""

import collections
from collections.abc import Hashable

import jax
import numpy as np

from mllm_jax.data.batch import Batch
from mllm_jax.inference.batching import Chunk, Request, lay_out, with_images
from mllm_jax.inference.prefill import prefill_limit, without_remat
from mllm_jax.inference.prefixes import LoadImage, Prefixes, PromptBatch, compute_prefixes
from mllm_jax.models.mllm import ModelConfig, Params

MOST_BYTES = 256 << 20  # of keys, values and visual tokens that are kept


class PrefixCache:
    """Makes batches of one prompt, and keeps the prefixes of the latest ones (`batching.Request.prefix_key`).

    Args:
      config, params: the model.
      most_bytes: that kept prefixes may take; the one used longest ago leaves first.

    Attributes:
      hits, misses: prompts whose prefix was there, and those whose was computed.
    """

    def __init__(self, config: ModelConfig, params: Params, *, most_bytes: int = MOST_BYTES):
        self._config, self._params = without_remat(config), params
        self._limit, self._most_bytes = prefill_limit(), most_bytes
        self._kept: collections.OrderedDict[Hashable, Prefixes] = collections.OrderedDict()
        self._bytes = 0
        self.hits = self.misses = 0

    def prompt_batch(self, request: Request, load_image: LoadImage | None) -> PromptBatch:
        """The request as a batch of its own.

        Args:
          request: equal keys of images are the same image also in other requests.
          load_image: an image's slots; called where the prefix is not there yet.

        Raises:
          SampleError: the prompt's visual tokens do not fit its images.
        """
        request.check(self._config.visual_layout.slot)
        prompt, cut = request.prompt, request.cut
        prefixes = self._prefixes(request, load_image)
        rows = lay_out([(prompt, cut, len(prompt))], padded(len(prompt) - cut), 1)
        return PromptBatch([request], rows, prefixes, np.zeros(1, np.int32))

    def _prefixes(self, request: Request, load_image: LoadImage | None) -> Prefixes:
        key = request.prefix_key
        if key in self._kept:
            self._kept.move_to_end(key)
            self.hits += 1
            return self._kept[key]
        self.misses += 1
        found = compute_prefixes(self._config, self._params, self._rows(request, load_image), self._limit)
        self._kept[key] = found
        self._bytes += _size(found)
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return found

    def _rows(self, request: Request, load_image: LoadImage | None) -> Batch:
        prompt, cut = request.prompt, request.cut
        rows = lay_out([(prompt, 0, cut)], padded(cut) if cut else 0, 1)
        alone = Chunk([request], [request], np.zeros(1, np.int32))
        if slots := alone.image_slots(self._config.visual_layout.most_slots):
            images = [load_image(*one) for one in zip(request.images, prompt.layouts, strict=True)]
            rows = with_images(rows, [prompt], [images], slots, self._config.visual_layout.slot)
        return rows


def padded(length: int) -> int:
    """The length to which so many tokens are padded: a fifth more at most, or 32; few lengths are compiled.

    >>> [padded(length) for length in (1, 33, 100, 1000, 1030)]
    [32, 64, 128, 1024, 1280]
    """
    step = max(32, 1 << max(0, length.bit_length() - 3))
    return length + -length % step


def _size(prefixes: Prefixes) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(prefixes))
