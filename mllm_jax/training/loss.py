"""The training loss: weighted next-token cross-entropy, with logits only where a token is supervised."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mllm_jax.data.batch import Batch
from mllm_jax.models import mllm
from mllm_jax.models.heads import devices_over
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
      label_tokens: most supervised tokens that a row may hold. The supervised positions of each row (of each piece,
        where devices share the positions of a row) are brought together, so that logits [B, label_tokens, V] are made
        in chunks and nothing else; the pipeline makes sure that no row has more.
      rng: for dropout; None = deterministic.
    """
    rngs = None if rng is None else {"dropout": rng}
    hidden, _ = mllm.apply(
        config, params, batch, method="hidden_states", deterministic=rng is None, rngs=rngs
    )
    pieces = devices_over("length")  # of a row; each device finds the supervised positions of its own

    def cut(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B P T/P ..."]:
        return x.reshape(x.shape[0], pieces, -1, *x.shape[2:])

    # Position t predicts token t + 1, and nothing predicts the first token.
    weights, targets = (
        cut(jnp.pad(x[:, 1:], ((0, 0), (0, 1))))
        for x in (batch.loss_weights.astype(jnp.float32), batch.tokens)
    )
    hidden = cut(hidden)
    if pieces > 1:
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", None, "embed"))
    order = jnp.argsort(weights == 0, axis=2, stable=True)[:, :, :label_tokens]
    weights, targets = (jnp.take_along_axis(x, order, axis=2) for x in (weights, targets))
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=2)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(carry, inputs):
        hidden, targets, weights = inputs
        logits = mllm.apply(config, params, hidden, method="logits")
        label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - label
        # A position without weight must not matter, whatever its logits are.
        return carry + jnp.where(weights != 0, losses * weights, 0.0).sum(), None

    chunks = -(-targets.shape[2] // CHUNK)
    size = -(-targets.shape[2] // chunks)  # as even as can be: no last chunk that is mostly padding
    pad = chunks * size - targets.shape[2]
    parts = [
        jnp.pad(x, [(0, 0)] * 2 + [(0, pad)] + [(0, 0)] * (x.ndim - 3)) for x in (hidden, targets, weights)
    ]
    parts = [jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0) for x in parts]
    total, _ = jax.lax.scan(chunk, jnp.float32(0), tuple(parts))
    return total, weights.sum()
