"""What a model computes on the way to an answer: hidden states of encoder and LLM, visual tokens, logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.data.batch import Batch
from mllm_jax.inference.batching import Request, lay_out, with_images
from mllm_jax.inference.prefill import without_remat
from mllm_jax.inference.prefixes import LoadImage
from mllm_jax.models.encoders import vision_encoder
from mllm_jax.models.mllm import MLLM, ModelConfig, Params
from mllm_jax.parallel.mesh import current_row_shards, replicate

_LENGTH_STEP = 64  # sequences are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenStates:
    """Every layer's states of one sequence of T tokens with I image slots, as NumPy arrays.

    Attributes:
      tokens: token ids; 0 at visual tokens.
      image_of: which image a visual token belongs to; -1 for text.
      encoder: `encoder[:, k]` is hs[k] of the (first) vision encoder, of each view of a slot: its embeddings (k = 0),
        or the output of block k; as far as the connector needs blocks. N patches in row-major order.
      grid: rows and columns of the patches; of images at their own aspect ratio one row of all that there is room for.
      visual: the connector's M tokens of every image slot, of which the LLM reads what the layout keeps.
      llm: `llm[k]` is hs[k] of the LLM: what goes into its first block (k = 0), or the output of block k.
      final: the last block's output behind the final norm.
      logits: of the token after each position.

    Examples:
      >>> import mllm_jax
      >>> states = mllm_jax.load("runs/quickstart").hidden_states("cat.jpg", "What is this?")
      >>> len(states.tokens) == states.llm.shape[1] == len(states.logits)
      True
      >>> states.encoder.shape[2] == states.grid[0] * states.grid[1]
      True
    """

    tokens: Int32[np.ndarray, " T"]
    image_of: Int32[np.ndarray, " T"]
    encoder: Float32[np.ndarray, "I K N C"]
    grid: tuple[int, int]
    visual: Float32[np.ndarray, "I M D"]
    llm: Float32[np.ndarray, "L T D"]
    final: Float32[np.ndarray, "T D"]
    logits: Float32[np.ndarray, "T V"]


def request_row(config: ModelConfig, request: Request, load_image: LoadImage | None) -> Batch:
    """One request as a batch of its own; further rows of the batch, where the mesh splits rows, are empty."""
    rows, length = current_row_shards(), len(request.prompt)
    batch = lay_out([(request.prompt, 0, length)], length + -length % _LENGTH_STEP, rows)
    if not request.images:
        return batch
    images = [list(map(load_image, request.images, request.prompt.layouts))]
    return with_images(batch, [request.prompt], images, request.prompt.num_slots, config.visual_layout.slot)


def sequence_logits(
    config: ModelConfig, params: Params, request: Request, load_image: LoadImage | None
) -> Float32[np.ndarray, "T V"]:
    """Logits of the token after each position of a request's sequence, its answer included if it has one."""
    batch = request_row(config, request, load_image)
    return np.asarray(_all_logits(without_remat(config), params, batch))[: len(request.prompt)]


@functools.partial(jax.jit, static_argnums=0)
def _all_logits(config: ModelConfig, params: Params, batch: Batch) -> Float[Array, "T V"]:
    return replicate(MLLM(config).apply({"params": params}, batch)[0])


def hidden_states(
    config: ModelConfig, params: Params, request: Request, load_image: LoadImage | None
) -> HiddenStates:
    """Every layer's states of a request's sequence, its answer included if it has one."""
    config, length = without_remat(config), len(request.prompt)
    batch = request_row(config, request, load_image)
    encoder, visual, layers, final, logits = jax.device_get(_states(config, params, batch))
    return HiddenStates(
        tokens=request.prompt.tokens,
        image_of=request.prompt.image_of,
        encoder=encoder,
        grid=config.vision_spec.grid,
        visual=visual,
        llm=layers[:, :length],
        final=final[:length],
        logits=logits[:length],
    )


@functools.partial(jax.jit, static_argnums=0)
def _states(config: ModelConfig, params: Params, batch: Batch) -> tuple[Array, ...]:
    def run(module: MLLM, batch: Batch) -> tuple[Array | None, Array, Array, Array]:
        visual = module.visual_tokens(batch)
        embeddings = module.embed(batch, visual)
        hidden, _ = module.llm(embeddings, batch.positions, batch.segment_ids)
        return visual, embeddings, hidden, module.logits(hidden)

    (visual, embeddings, hidden, logits), kept = MLLM(config).apply(
        {"params": params}, batch, method=run, mutable=["intermediates"]
    )
    (blocks,) = jax.tree.leaves(kept)  # the outputs of the LLM's blocks [L, B, T, D]; nothing else is kept
    layers = jnp.concatenate([embeddings[:1].astype(blocks.dtype), blocks[:, 0]])

    slot_tokens, deepest = config.visual_layout.slot.num_tokens, config.make_connector().request().deepest
    slots = 0 if batch.images is None else batch.images.shape[1]
    if slots:
        everything = FeatureRequest(hidden=tuple(range(deepest + 1)))
        dtype = jnp.dtype(config.dtype)
        encoder = vision_encoder(config.vision, everything, dtype, dtype, attention=config.attention)
        grids = () if batch.grids is None else (batch.grids[0],)
        features = encoder.apply({"params": params["vision"]}, batch.images[0], *grids)
        encoded = jnp.stack([features.hidden[layer] for layer in range(deepest + 1)], axis=1)
        visual = visual[0].reshape(slots, slot_tokens, -1)
    else:
        rows, columns = config.vision_spec.grid
        encoded = jnp.zeros((0, deepest + 1, rows * columns, config.vision.width))
        visual = jnp.zeros((0, slot_tokens, config.llm.width))
    found = (encoded, visual, layers, hidden[0], logits[0])
    return replicate(tuple(states.astype(jnp.float32) for states in found))
