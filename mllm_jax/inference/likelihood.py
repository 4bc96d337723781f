"""How likely a model finds given answers: the second way to take a multiple-choice answer from it."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mllm_jax.data.batch import Batch
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.inference.batching import DEFAULT_BUCKETS, Request, bucket
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
from mllm_jax.models.mllm import ModelConfig, Params

_ANSWER_BUCKETS = (4, 8, 16, 32, 64)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: ModelConfig,
    params: Params,
    prefixes: Prefixes,
    rows: Batch,
    columns: Int[Array, "B A"],
    targets: Int[Array, "B A"],
    valid: Bool[Array, "B A"],
) -> Float[Array, " B"]:
    """Sum over the answer of the log-probability of `targets`, each predicted at its column of the suffix."""
    cache = prefixes.cache(rows.tokens.shape[1])
    hidden, _ = mllm.apply(config, params, rows, prefixes.visual, cache, method=run_suffix)
    hidden = jnp.take_along_axis(hidden, columns[..., None], axis=1)
    logits = mllm.apply(config, params, hidden, method="logits")
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return everywhere(jnp.where(valid, chosen - jax.nn.logsumexp(logits, axis=-1), 0).sum(-1))


def answer_log_likelihoods(
    config: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    *,
    load_image: LoadImage | None = None,
    batch_size: int,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    threads: int = 4,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[float]:
    """log p(answer | prompt) of each request, in nats, in the order in which they come.

    Args:
      requests: conversations with one or more answers from `tokens.encode_sample`; what the template lets a
        model learn counts, the closing token of the answer included.
      load_image, batch_size, buckets, threads, on_batch: as in `generation.generate`.

    Raises:
      SampleTooLong: longer than the LLM's context.
      SampleError: the visual tokens do not fit the pictures.
      ValueError: a request without an answer.
    """
    batch_size += -batch_size % row_shards()
    config, limit = without_remat(config), config.llm.max_positions

    def checked() -> Iterator[Request]:
        for request in requests:
            if len(request.prompt) > limit:
                raise SampleTooLong(request.id, len(request.prompt), limit)
            if not request.prompt.loss_weights.any():
                raise ValueError(f"request {request.id!r} has no answer whose likelihood could be computed")
            yield request

    pools = prefix_pools(
        config, params, checked(), load_image=load_image, batch_size=batch_size, threads=threads
    )
    for chunk, pool in pools:
        found = np.zeros(len(chunk.requests))
        for chosen, rows in chunk.suffix_batches(batch_size, buckets):
            which = np.zeros(batch_size, np.int32)
            which[: len(chosen)] = chunk.prefix_of[chosen]
            targets = _targets([chunk.requests[i] for i in chosen], batch_size)
            scores = _score(config, params, select(pool, which), rows, *targets)
            found[chosen] = np.asarray(scores)[: len(chosen)]
            if on_batch is not None:
                on_batch(len(chosen))
        yield from found.tolist()


def option_log_likelihoods(
    config: ModelConfig, params: Params, questions: Iterable[Sequence[Request]], **settings: Any
) -> Iterator[list[float]]:
    """log p(option | prompt) of every option of every question.

    Args:
      questions: per question one request per option, the option being the answer.
      **settings: of `answer_log_likelihoods`.
    """
    counts: list[int] = []

    def flat() -> Iterator[Request]:
        for options in questions:
            counts.append(len(options))
            yield from options

    scores: list[float] = []
    question = 0
    for score in answer_log_likelihoods(config, params, flat(), **settings):
        scores.append(score)
        if len(scores) == counts[question]:
            yield scores
            scores, question = [], question + 1


def _targets(requests: Sequence[Request], batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of the suffix that predict the answer, the ids they should predict, and which are real."""
    places = [np.flatnonzero(request.prompt.loss_weights) for request in requests]
    shape = (batch_size, bucket(max(map(len, places)), _ANSWER_BUCKETS))
    columns, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    valid = np.zeros(shape, bool)
    for row, (request, place) in enumerate(zip(requests, places, strict=True)):
        here = slice(0, len(place))
        columns[row, here] = place - 1 - request.cut
        targets[row, here] = request.prompt.tokens[place]
        valid[row, here] = True
    return columns, targets, valid
