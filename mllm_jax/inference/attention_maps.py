"""Which visual tokens an answer attended to, and where in the images these are.

The weights are those of a plain forward pass over prompt and answer with the oracle attention, averaged over heads. A
visual token's weight is then brought to the image: to its cell of the connector's grid; or, where its tokens have no
place (those of learned queries), to the patches that they attended to in the connector.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, UInt8

from mllm_jax.data.batch import Batch
from mllm_jax.data.layout import VisualLayout
from mllm_jax.inference.batching import Request
from mllm_jax.inference.prefill import prefill_limit, read, without_remat
from mllm_jax.inference.prefixes import LoadImage
from mllm_jax.inference.states import request_row
from mllm_jax.inference.stream import TextStream
from mllm_jax.models import mllm
from mllm_jax.models.mllm import MLLM, ModelConfig, Params
from mllm_jax.parallel.mesh import replicate

_STEP = 32  # answers are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A part of an image or video as the model sees it.

    Attributes:
      image: the number of the image or video in the prompt.
      kind: "image", the whole image; "tiles", the tiles of a high-resolution image put together; "frame", of a video.
      number: of the frame among those that are picked; else 0.
      pixels: what the vision encoder gets.
    """

    image: int
    kind: str
    number: int
    pixels: UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaps:
    """How the A tokens of an answer attended to the n visual tokens of its prompt, in the L blocks of the LLM.

    Attributes:
      tokens: of the answer.
      pieces: the text of each of them; joined they are the answer.
      weights: from the position at which a token was chosen (the one before it) to each visual token; the mean over
        heads. What is missing to 1 goes to text.
      image_of: which image or video of the prompt a visual token belongs to.
      views: what the model sees, in the order of `on_views`.
      place: "grid" where the connector's tokens stand on a grid over the image, "attention" where they do not and the
        connector's own attention to the patches says where they come from, "none" where nothing does.
    """

    tokens: Int32[np.ndarray, " A"]
    pieces: tuple[str, ...]
    weights: Float32[np.ndarray, "L A n"]
    image_of: Int32[np.ndarray, " n"]
    views: tuple[View, ...]
    place: str
    _layouts: tuple[VisualLayout, ...]
    _grid: tuple[int, int]  # of a slot
    _patches: Float32[np.ndarray, "I M N"] | None  # what the connector's tokens attended to

    def on_views(self, weights: Float[np.ndarray, "*b n"]) -> list[Float32[np.ndarray, "*b rows columns"]]:
        """Weights of the visual tokens on each view's grid; [] where the tokens have no place (`place` is "none").

        The weight of a token that is made of several (shrunk, pooled) is divided among these as they enter it, in equal
        parts where it is their maximum; that of learned separators is on no view.

        Args:
          weights: such as `weights[-1]` of the last block or `weights.mean(axis=(0, 1))` of all blocks and tokens.
        """
        if self.place == "none":
            return []
        found, first = [], 0
        for image, layout in enumerate(self._layouts):
            slots = _on_slots(layout, weights[..., self.image_of == image])
            if self._patches is not None:
                own = self._patches[first : first + len(layout.slots)]
                slots = np.einsum("...im,imn->...in", slots, own)
            first += len(layout.slots)
            rows, columns = layout.grid or self._grid
            slots = slots[..., : rows * columns].reshape(*slots.shape[:-1], rows, columns)
            slots = np.moveaxis(slots, (-3, -2, -1), (0, 1, 2))
            found += [np.moveaxis(view, (0, 1), (-2, -1)) for view in _views(layout, slots)]
        return [np.asarray(view, np.float32) for view in found]


def attention_maps(model: Any, request: Request, load_image: LoadImage | None) -> AttentionMaps:
    """The attention of a request's last answer.

    Args:
      model: an `inference.model.Model`.
      request: whose prompt ends with an answer (`tokens.encode_sample`).
      load_image: as in `generate.generate`.

    Raises:
      ValueError: the answer has no text.
      SampleError: the prompt's visual tokens do not fit its images.
    """
    config, prompt = without_remat(model.config), request.prompt
    request.check(config.visual_layout.slot)
    last = int(np.flatnonzero(prompt.loss_weights)[-1])
    first = int(np.flatnonzero(prompt.loss_weights[:last] == 0)[-1]) + 1
    tokens = prompt.tokens[first : last + 1]
    pieces = _pieces(model, tokens)
    if not pieces:
        raise ValueError("the answer has no text, so that nothing attends to the image; give one with a word")
    tokens = tokens[: len(pieces)]

    batch = request_row(config, request, load_image)
    count = min(len(tokens) + -len(tokens) % _STEP, batch.tokens.shape[1])
    start = min(first - 1, batch.tokens.shape[1] - count)
    weights = np.asarray(_weights(config, prefill_limit(), count, model.params, batch, np.int32(start)))
    weights = weights[:, first - 1 - start :][:, : len(tokens)]
    visual = np.flatnonzero(prompt.image_of >= 0)

    # At its own aspect ratio each image has a grid of its own, in its layout.
    grid, patches = config.vision_spec.grid if config.max_patches else config.token_grid, None
    if grid is None and batch.images is not None:
        patches = _connector_attention(config, model.params, batch)
    return AttentionMaps(
        tokens=tokens,
        pieces=pieces,
        weights=weights[:, :, visual],
        image_of=prompt.image_of[visual],
        views=tuple(_all_views(request, load_image)),
        place="grid" if grid else "none" if patches is None else "attention",
        _layouts=prompt.layouts,
        _grid=grid or config.vision_spec.grid,
        _patches=patches,
    )


def _pieces(model: Any, tokens: Int32[np.ndarray, " A"]) -> tuple[str, ...]:
    """The text of each token, up to the last one that has any; what closes the answer has none."""
    text = TextStream(model.tokenizer, model.stop_texts())
    pieces = [text.push(int(token)) for token in tokens]
    pieces[-1] += text.finish()
    while pieces and not pieces[-1]:
        pieces.pop()
    return tuple(pieces)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _weights(
    config: ModelConfig, limit: int, count: int, params: Params, batch: Batch, start: Int[Array, ""]
) -> Float[Array, "L Q T"]:
    """How the `count` positions from `start` on attend to all positions, as the mean over heads."""
    visual = mllm.apply(config, params, batch, method="visual_tokens")
    rows = batch.replace(images=None, image_mask=None, grids=None)
    cache = mllm.empty_cache(config, *batch.tokens.shape)
    nowhere = jnp.zeros((len(batch.tokens), 0), jnp.int32)
    _, cache = read(config, params, rows, visual, cache, nowhere, limit)

    def again(module: MLLM, rows: Batch) -> None:
        module.llm(module.embed(rows, visual), rows.positions, rows.segment_ids, cache.replace(column=start))

    queries = rows.map(lambda field, _: jax.lax.dynamic_slice_in_dim(field, start, count, axis=1))
    _, kept = MLLM(config).apply({"params": params}, queries, method=again, mutable=["attention"])
    (weights,) = jax.tree.leaves(kept)
    return replicate(weights[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def _kept_attention(config: ModelConfig, params: Params, images: UInt8[Array, "I H W 3"]) -> list[Array]:
    def connect(module: MLLM) -> None:
        module.connector(module.vision(images))

    _, kept = MLLM(config).apply({"params": params}, method=connect, mutable=["attention"])
    return replicate(jax.tree.leaves(kept.get("attention", {}).get("connector", {})))


def _connector_attention(
    config: ModelConfig, params: Params, batch: Batch
) -> Float32[np.ndarray, "I M N"] | None:
    """Each slot token's shares of the patches: the mean of the connector's layers, scaled to a sum of 1; None if none.

    Tokens that attend to no patch (learned ones at the end) have 0 everywhere.
    """
    if config.vision.views != 1 or not config.vision.regular:
        return None
    kept = _kept_attention(config, params, batch.images[0])
    if not kept:
        return None
    mean = np.mean([np.asarray(layer) for layer in kept], axis=0)
    missing = config.visual_layout.slot.num_tokens - mean.shape[1]
    mean = np.pad(mean, ((0, 0), (0, missing), (0, 0)))
    return mean / np.maximum(mean.sum(axis=-1, keepdims=True), 1e-9)


def _on_slots(layout: VisualLayout, weights: Float[np.ndarray, "*b n"]) -> Float[np.ndarray, "*b s M"]:
    """Weights of an image's visual tokens as weights of the tokens of its slots."""
    taps = layout.kept.reshape(len(layout.kept), -1)
    shares = np.ones(taps.shape, np.float32) if layout.weights is None else np.abs(layout.weights)
    shares = np.where(taps >= 0, shares, 0)
    shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-9)
    found = np.zeros((*weights.shape[:-1], layout.slot_tokens), np.float32)
    for tap, share in zip(taps.T, shares.T, strict=True):
        np.add.at(found, (..., np.maximum(tap, 0)), weights * share)
    return found.reshape(*weights.shape[:-1], len(layout.slots), -1)


def _views(layout: VisualLayout, slots: Any) -> list[Any]:
    """Arrays [slots, rows, columns, ...] put together to the views of an image: tiles are one, other slots one each."""
    if layout.canvas is None:
        return list(slots)
    height, width = layout.slots[0].size
    down, across = layout.canvas[0] // height, layout.canvas[1] // width
    whole, tiles = slots[: len(slots) - down * across], slots[len(slots) - down * across :]
    rows, columns, *rest = tiles.shape[1:]
    grid = np.moveaxis(tiles.reshape(down, across, rows, columns, *rest), 2, 1)
    return [*whole, grid.reshape(down * rows, across * columns, *rest)]


def _all_views(request: Request, load_image: LoadImage | None) -> list[View]:
    found = []
    for image, (key, layout) in enumerate(zip(request.images, request.prompt.layouts, strict=True)):
        slots = load_image(key, layout)
        if layout.grid is not None:
            slots = _unfolded(slots, layout.grid)
        frames = layout.canvas is None and len(layout.slots) > 1
        views = _views(layout, slots)
        for number, pixels in enumerate(views):
            tiles = layout.canvas is not None and number == len(views) - 1
            kind = "frame" if frames else "tiles" if tiles else "image"
            found.append(View(image, kind, number if frames else 0, np.ascontiguousarray(pixels)))
    return found


def _unfolded(slots: UInt8[np.ndarray, "1 p Lp 3"], grid: tuple[int, int]) -> UInt8[np.ndarray, "1 h w 3"]:
    """An image at its own aspect ratio from its patches, which stand one beside the other (`data.naflex`)."""
    (rows, columns), side = grid, slots.shape[1]
    patches = slots[0, :, : rows * columns * side].reshape(side, rows, columns, side, 3)
    return patches.transpose(1, 0, 2, 3, 4).reshape(1, rows * side, columns * side, 3)
