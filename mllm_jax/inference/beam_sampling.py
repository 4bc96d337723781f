"""Beam search over sampled candidates, as transformers' `do_sample=True, num_beams=W` decodes (MMMU, upstream).

Every step keeps the `top_k` best tokens of each beam, draws candidates among them without replacement from the softmax
of the beams' accumulated log probabilities, keeps the likeliest of those drawn, and ends an answer by the
length-normalised rule of beam search. The draws are JAX's, made from the seed and the question's id: the same for any
batch, bucket and number of devices, but not torch's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from mllm_jax.data.batch import Batch
from mllm_jax.inference.prefill import decode, read_prompts
from mllm_jax.inference.sampling import request_key
from mllm_jax.models import mllm
from mllm_jax.models.decoder import Cache
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import replicate

_NEVER = -1e30  # below every score


@dataclasses.dataclass(frozen=True)
class BeamSampling:
    """How answers are drawn: `beams` at once at a `temperature` above 0; another `seed` gives other answers.

    Only the `top_k` best tokens of a beam can follow it. 50 is what transformers samples with by default
    (`GenerationConfig`), and so upstream, which sets none; 0 keeps all.
    """

    seed: int = 42
    beams: int = 5
    temperature: float = 1.0
    top_k: int = 50

    def __post_init__(self):
        if self.beams < 1 or self.temperature <= 0 or self.top_k < 0:
            raise ValueError(
                f"{self}: at least one beam, a temperature above 0 and no top_k below 0 are needed"
            )

    def key(self, name: str) -> np.ndarray:
        """The random key (uint32[2]) of the question of that name."""
        return request_key(self.seed, name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """Rows' beams while they grow, and the best answers that have ended."""

    step: Int[Array, ""]
    tokens: Int[Array, "B W N"]
    scores: Float[Array, "B W"]
    ended: Int[Array, "B W N"]
    ended_scores: Float[Array, "B W"]
    ended_counts: Int[Array, "B W"]
    done: Bool[Array, " B"]
    hidden: Float[Array, "R D"]
    cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def sample_answers(
    config: ModelConfig,
    sampling: BeamSampling,
    max_new_tokens: int,
    limit: int,
    params: Params,
    rows: Batch,
    lengths: Int[Array, " B"],
    visual: Float[Array, "B IM D"] | None,
    cache: Cache,
    stops: Int[Array, " n"],
    keys: UInt[Array, "B 2"],
) -> tuple[Int[Array, "B N"], Int[Array, " B"], Bool[Array, " B"]]:
    """Tokens [B, N] (N = max_new_tokens), how many of them count, and whether the answer ended by a stop id.

    Rows of length 0 fill the batch; `limit` is that of `prefill.read`. `keys` are `BeamSampling.key`s.
    """
    batch, width = len(lengths), sampling.beams
    hidden, positions, cache = read_prompts(config, params, rows, lengths, visual, cache, limit)
    hidden, start = (jnp.repeat(each, width, axis=0) for each in (hidden, positions))
    cache = cache.replace(
        k=jnp.repeat(cache.k, width, axis=1),
        v=jnp.repeat(cache.v, width, axis=1),
        segments=jnp.repeat(cache.segments, width, axis=0),
    )
    none = jnp.zeros((batch, width, max_new_tokens), jnp.int32)
    state = _Beams(
        jnp.int32(0),
        none,
        jnp.zeros((batch, width), jnp.float32),
        none,
        jnp.full((batch, width), _NEVER),
        jnp.zeros((batch, width), jnp.int32),
        lengths == 0,
        hidden,
        cache,
    )

    def advance(state: _Beams) -> _Beams:
        logits = mllm.apply(config, params, state.hidden, method="logits")
        grown, parents = _grow(state, logits.astype(jnp.float32), sampling, stops, keys)
        chosen = (jnp.arange(batch)[:, None] * width + parents).reshape(-1)
        before = state.cache
        cache = before.replace(k=before.k[:, chosen], v=before.v[:, chosen], segments=before.segments[chosen])
        tokens = grown.tokens[:, :, state.step].reshape(-1)
        hidden, cache = decode(config, params, tokens, start + state.step + 1, cache)
        return dataclasses.replace(grown, hidden=hidden, cache=cache)

    state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~s.done.all(), advance, state)
    # What has not ended competes with what has, unless the row was done.
    open_scores = jnp.where(state.done[:, None], _NEVER, state.scores / jnp.maximum(state.step, 1))
    scores = jnp.concatenate([state.ended_scores, open_scores], axis=1)
    tokens = jnp.concatenate([state.ended, state.tokens], axis=1)
    counts = jnp.concatenate([state.ended_counts, jnp.full((batch, width), state.step)], axis=1)
    best = jnp.argmax(scores, axis=1)
    index = jnp.arange(batch)
    counts = jnp.where(lengths == 0, 0, counts[index, best])
    return replicate((tokens[index, best], counts, best < width))


def _grow(
    state: _Beams,
    logits: Float[Array, "R V"],
    sampling: BeamSampling,
    stops: Int[Array, " n"],
    keys: UInt[Array, "B 2"],
) -> tuple[_Beams, Int[Array, "B W"]]:
    """One more token for every beam, and which beam each was before (`hidden` and `cache` are left as they were)."""
    batch, width = state.scores.shape
    vocab = logits.shape[-1]
    total = state.scores[:, :, None] + jax.nn.log_softmax(logits).reshape(batch, width, vocab)
    total = total / sampling.temperature
    # As transformers: never fewer than can all be stop ids and one more.
    kept = min(max(sampling.top_k, 1 + stops.shape[0]), vocab)
    if sampling.top_k:
        total = jnp.where(total < jax.lax.top_k(total, kept)[0][:, :, -1:], -jnp.inf, total)
    total = total.reshape(batch, width * vocab)

    def noise(key: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), state.step)
        return jax.random.gumbel(key, (width * vocab,))

    # Gumbel top-k is sampling without replacement; enough candidates that not all can be stop ids.
    count = width * max(2, 1 + stops.shape[0])
    drawn = jax.lax.top_k(total + jax.vmap(noise)(keys), count)[1]
    values, order = jax.lax.top_k(jnp.take_along_axis(total, drawn, axis=1), drawn.shape[1])
    drawn = jnp.take_along_axis(drawn, order, axis=1)
    parents, token = drawn // vocab, (drawn % vocab).astype(jnp.int32)
    stop = (token[:, :, None] == stops).any(-1)
    longer = jnp.take_along_axis(state.tokens, parents[:, :, None], axis=1).at[:, :, state.step].set(token)
    length = state.step + 1

    # A stop id among the first W candidates ends its beam's answer; the W best ends are kept.
    ends = stop & (jnp.arange(drawn.shape[1]) < width) & ~state.done[:, None]
    scores = jnp.concatenate([state.ended_scores, jnp.where(ends, values / length, _NEVER)], axis=1)
    kept_scores, kept = jax.lax.top_k(scores, width)
    counts = jnp.concatenate([state.ended_counts, jnp.full(drawn.shape, state.step)], axis=1)
    texts = jnp.concatenate([state.ended, longer], axis=1)

    # The best W others go on: stop ids are moved behind them, the order stays.
    alive = jnp.argsort(stop, axis=1, stable=True)[:, :width]
    pick: Any = functools.partial(jnp.take_along_axis, indices=alive, axis=1)
    done = state.done | (kept_scores[:, -1] >= values[:, 0] / length)
    grown = dataclasses.replace(
        state,
        step=length,
        tokens=jnp.take_along_axis(longer, alive[:, :, None], axis=1),
        scores=pick(values),
        ended=jnp.take_along_axis(texts, kept[:, :, None], axis=1),
        ended_scores=kept_scores,
        ended_counts=jnp.take_along_axis(counts, kept, axis=1),
        done=done,
    )
    return grown, pick(parents)
