"""How likely a model finds given answers: the second way to take a multiple-choice answer from it."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mllm_jax.data.batch import Batch
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.inference.batching import DEFAULT_BUCKETS, Request, bucket
from mllm_jax.inference.prefill import prefill_limit, read, without_remat
from mllm_jax.inference.prefixes import LoadImage, PromptBatch, answer_in_order
from mllm_jax.models import mllm
from mllm_jax.models.decoder import Cache
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import current_row_shards, replicate

_ANSWER_BUCKETS = (4, 8, 16, 32, 64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    config: ModelConfig,
    limit: int,
    params: Params,
    rows: Batch,
    visual: Float[Array, "B IM D"] | None,
    cache: Cache,
    columns: Int[Array, "B A"],
    targets: Int[Array, "B A"],
    valid: Bool[Array, "B A"],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Sum over the answer of the log-probability of `targets`, each predicted at its column of the suffix.

    Also whether each target is the likeliest token there.
    """
    hidden, _ = read(config, params, rows, visual, cache, columns, limit)

    def log_probability(at: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = mllm.apply(config, params, at[0], method="logits")
        target = jnp.take_along_axis(logits, at[1][:, None], axis=-1)[:, 0]
        return target - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == at[1]

    per_column = (
        8 * config.llm.vocab * -(-len(targets) // current_row_shards())
    )  # logits, and their exponentials
    found, likeliest = jax.lax.map(
        log_probability, (hidden.swapaxes(0, 1), targets.T), batch_size=max(1, limit // per_column)
    )
    return replicate((jnp.where(valid, found.T, 0).sum(-1), (likeliest.T | ~valid).all(-1)))


class Likelihood(NamedTuple):
    """Of an answer: its log-likelihood in nats, and whether greedy decoding would give it."""

    value: float
    greedy: bool


def answer_likelihoods(
    config: ModelConfig,
    params: Params,
    requests: Iterable[Request],
    *,
    load_image: LoadImage | None = None,
    batch_size: int,
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    threads: int = 4,
    on_batch: Callable[[int], None] | None = None,
    prefill_bytes: int | None = None,
) -> Iterator[Likelihood]:
    """log p(answer | prompt) of each request, in the order in which they come.

    Args:
      requests: conversations with one or more answers from `tokens.encode_sample`; what the template lets a
        model learn counts, the closing token of the answer included.
      load_image, batch_size, buckets, threads, on_batch, prefill_bytes: as in `generate.generate`.

    Raises:
      SampleTooLong: longer than the LLM's context.
      SampleError: the visual tokens do not fit the images.
      ValueError: a request without an answer.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    config, limit = without_remat(config), prefill_limit(prefill_bytes)

    def fitting_requests() -> Iterator[Request]:
        for request in requests:
            if len(request.prompt) > config.llm.max_positions:
                raise SampleTooLong(request.id, len(request.prompt), config.llm.max_positions)
            if not request.prompt.loss_weights.any():
                raise ValueError(f"request {request.id!r} has no answer whose likelihood could be computed")
            yield request

    def answer(prompts: PromptBatch) -> list[Likelihood]:
        targets = _targets(prompts.requests, len(prompts.lengths))
        visual, cache = prompts.open_cache(prompts.rows.tokens.shape[1])
        found = jax.device_get(_score(config, limit, params, prompts.rows, visual, cache, *targets))
        pairs = zip(*(each[: len(prompts.requests)].tolist() for each in found), strict=True)
        return [Likelihood(value, greedy) for value, greedy in pairs]

    yield from answer_in_order(
        config,
        params,
        fitting_requests(),
        answer,
        load_image=load_image,
        batch_size=batch_size + -batch_size % current_row_shards(),
        buckets=buckets,
        threads=threads,
        limit=limit,
        on_batch=on_batch,
    )


def answer_log_likelihoods(
    config: ModelConfig, params: Params, requests: Iterable[Request], **settings: Any
) -> Iterator[float]:
    """log p(answer | prompt) of each request, in nats; args and raises as in `answer_likelihoods`."""
    for found in answer_likelihoods(config, params, requests, **settings):
        yield found.value


def option_log_likelihoods(
    config: ModelConfig, params: Params, questions: Iterable[Sequence[Request]], **settings: Any
) -> Iterator[list[float]]:
    """log p(option | prompt) of every option of every question.

    Args:
      questions: per question one request per option, the option being the answer.
      **settings: of `answer_likelihoods`.
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
