"""The training loss: weighted next-token cross-entropy, with logits only where a token is supervised."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.data.batch import Batch
from mllm_jax.models import mllm
from mllm_jax.models.mllm import ModelConfig

CHUNK = 128  # most positions of a row whose logits exist at a time


def weighted_loss(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    label_tokens: int,
    rng: Array | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of loss * weight, and sum of weights, both float32: what accumulates over micro-batches and devices.

    Args:
      label_tokens: most supervised tokens that a row may hold. The supervised positions of each row are brought
        together, so that logits [B, label_tokens, V] are made in chunks and nothing else; the pipeline makes sure that
        no row has more.
      rng: for dropout; None = deterministic.
    """
    rngs = None if rng is None else {"dropout": rng}
    hidden, _ = mllm.apply(
        config, params, batch, method="hidden_states", deterministic=rng is None, rngs=rngs
    )
    weights = batch.loss_weights.astype(jnp.float32).at[:, 0].set(0.0)  # nothing predicts the first token
    order = jnp.argsort(weights == 0, axis=1, stable=True)[:, :label_tokens]
    weights = jnp.take_along_axis(weights, order, axis=1)
    targets = jnp.take_along_axis(batch.tokens, order, axis=1)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(order - 1, 0)[..., None], axis=1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(carry, inputs):
        hidden, targets, weights = inputs
        logits = mllm.apply(config, params, hidden, method="logits")
        label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - label
        # A position without weight must not matter, whatever its logits are.
        return carry + jnp.where(weights != 0, losses * weights, 0.0).sum(), None

    chunks = -(-targets.shape[1] // CHUNK)
    size = -(-targets.shape[1] // chunks)  # as even as can be: no last chunk that is mostly padding
    pad = chunks * size - targets.shape[1]
    parts = [jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, targets, weights)]
    parts = [x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1) for x in parts]
    total, _ = jax.lax.scan(chunk, jnp.float32(0), tuple(parts))
    return total, weights.sum()
