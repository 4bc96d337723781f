"""Generation in batches with a KV cache: greedy, or by sampled beams (`beam_sampling.py`).

Three jitted functions, each compiled for few shapes: prefixes (pictures; `prefixes.py`), then per batch the
suffixes, of which only the last real position's logits are made, and the decode loop, which ends when every
row has met a stop id. Rows never see each other and padding is masked, so the answers do not depend on batch
size, bucket or neighbours.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mllm_jax.data.batch import Batch
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.inference.batching import DEFAULT_BUCKETS, Request
from mllm_jax.inference.beam_sampling import Sampling, sample_answers
from mllm_jax.inference.prefixes import (
    LoadImage,
    Prefixes,
    everywhere,
    prefix_pools,
    row_shards,
    run_suffix,
    select,
    without_remat,
)
from mllm_jax.models import mllm
from mllm_jax.models.decoder import Cache
from mllm_jax.models.mllm import ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generated answer.

    Attributes:
      id: the request's.
      tokens: generated ids, without the stop id.
      text: decoded, cut at the stop text, without surrounding white space.
      stopped: whether it ended by itself (stop id or stop text) rather than at `max_new_tokens`.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    stopped: bool


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(
    config: ModelConfig,
    max_new_tokens: int,
    params: Params,
    prefixes: Prefixes,
    rows: Batch,
    lengths: Int[Array, " B"],
    stops: Int[Array, " n"],
) -> tuple[Int[Array, "B N"], Int[Array, " B"], Bool[Array, " B"]]:
    """Greedy tokens [B, N] (N = max_new_tokens), how many of them count, and whether a stop id came.

    Rows of length 0 fill the batch; they count as stopped from the start.
    """
    batch, length = rows.tokens.shape
    cache = prefixes.cache(length + max_new_tokens)
    hidden, cache = mllm.apply(config, params, rows, prefixes.visual, cache, method=run_suffix)
    index = jnp.arange(batch)
    last = jnp.maximum(lengths - 1, 0)

    def pick(hidden: Array) -> Array:
        logits = mllm.apply(config, params, hidden, method="logits")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def is_stop(token: Array) -> Array:
        return (token[:, None] == stops).any(-1)

    first = pick(hidden[index, last])
    tokens = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first)
    start = rows.positions[index, last]
    stopped = is_stop(first)
    done = stopped | (lengths == 0)
    counts = jnp.where(done, 0, 1).astype(jnp.int32)

    def unfinished(state: tuple[Any, ...]) -> Array:
        step, done = state[0], state[3]
        return (step < max_new_tokens) & ~done.all()

    def advance(state: tuple[Array, Array, Array, Array, Array, Cache]) -> tuple[Any, ...]:
        step, tokens, counts, done, stopped, cache = state
        previous = jax.lax.dynamic_index_in_dim(tokens, step - 1, axis=1)
        positions = (start + step)[:, None]
        hidden, cache = mllm.apply(config, params, previous, positions, cache, method="decode")
        token = pick(hidden[:, 0])
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=1)
        stopped = stopped | (is_stop(token) & ~done)
        done = done | stopped
        return step + 1, tokens, counts + ~done, done, stopped, cache

    state = (jnp.int32(1), tokens, counts, done, stopped, cache)
    _, tokens, counts, _, stopped, _ = jax.lax.while_loop(unfinished, advance, state)
    return everywhere((tokens, counts, stopped))


def generate(
    config: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    tokenizer: Any,
    *,
    load_image: LoadImage | None = None,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: Sequence[int],
    stop_text: str = "",
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    threads: int = 4,
    on_batch: Callable[[int], None] | None = None,
    sampling: Sampling | None = None,
) -> Iterator[Generation]:
    """Answers requests greedily (or as `sampling` says), in the order in which they come.

    Requests are read ahead in chunks (at most 32 batches, fewer where the pictures need much memory); in a
    chunk the pictures' prefixes are computed once and the rest is sorted by length.

    Args:
      requests: prompts; a generator is read in a background thread.
      tokenizer: a Hugging Face tokenizer, for decoding.
      load_image: picture key -> uint8[S, S, 3], thread-safe.
      max_new_tokens: N, at most so many tokens per answer.
      batch_size: rows at once, rounded up to a multiple of the devices that share them; the last batch of a
        chunk is filled with empty rows. When sampling, every beam is a row, so that there are fewer questions.
      stop_ids: ids that end an answer (`tokens.stop_ids`).
      stop_text: text that ends an answer, for templates that close with text (`###`, a newline).
      buckets: lengths to which what follows the last picture is padded.
      threads: threads that load pictures.
      on_batch: told after each batch how many requests it finished.
      sampling: draw the answers instead; the draws belong to a request's id, not to its place.

    Raises:
      SampleTooLong: prompt and answer together exceed the LLM's context; names the request.
      SampleError: a prompt's visual tokens do not fit its pictures.
      ValueError: a size below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    stops = np.asarray(stop_ids, np.int32)
    questions = batch_size if sampling is None else max(1, batch_size // sampling.beams)
    batch_size, questions = (size + -size % row_shards() for size in (batch_size, questions))
    config, limit = without_remat(config), config.llm.max_positions

    def checked() -> Iterator[Request]:
        for request in requests:
            if len(request.prompt) + max_new_tokens > limit:
                raise SampleTooLong(request.id, len(request.prompt) + max_new_tokens, limit)
            yield request

    pools = prefix_pools(
        config, params, checked(), load_image=load_image, batch_size=batch_size, threads=threads
    )
    for chunk, pool in pools:
        answers: list[Generation | None] = [None] * len(chunk.requests)
        for chosen, rows in chunk.suffix_batches(questions, buckets):
            which = np.zeros(questions, np.int32)
            which[: len(chosen)] = chunk.prefix_of[chosen]
            batch = (params, select(pool, which), rows, (rows.segment_ids != 0).sum(1, dtype=np.int32), stops)
            if sampling is None:
                found = _answer(config, max_new_tokens, *batch)
            else:
                keys = np.zeros((questions, 2), np.uint32)
                keys[: len(chosen)] = [sampling.key(chunk.requests[index].id) for index in chosen]
                how = dataclasses.replace(sampling, seed=0)  # the keys hold it; nothing is compiled per seed
                found = sample_answers(config, how, max_new_tokens, *batch, keys)
            tokens, counts, stopped = jax.device_get(found)
            for row, index in enumerate(chosen):
                ids = tuple(tokens[row, : counts[row]].tolist())
                answers[index] = _finish(
                    chunk.requests[index].id, ids, bool(stopped[row]), tokenizer, stop_text
                )
            if on_batch is not None:
                on_batch(len(chosen))
        yield from answers


def _finish(name: str, ids: tuple[int, ...], stopped: bool, tokenizer: Any, stop_text: str) -> Generation:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if stop_text and stop_text in text:
        text, stopped = text.split(stop_text, 1)[0], True
    return Generation(name, ids, text.strip(), stopped)
