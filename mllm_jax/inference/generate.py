"""Generation in batches with a KV cache: greedy, sampled, or by sampled beams (`beam_sampling.py`).

Jitted functions, each compiled for few shapes: prefixes (images; `prefixes.py`), then per batch the suffixes, of which
only the last real position's logits are made, and the steps of `session.py`, until every row has met a stop id. Rows
never see each other and padding is masked, so the answers do not depend on batch size, bucket or neighbours.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.inference.batching import DEFAULT_BUCKETS, Request
from mllm_jax.inference.beam_sampling import BeamSampling, sample_answers
from mllm_jax.inference.prefixes import LoadImage, PromptBatch, answer_in_order
from mllm_jax.inference.sampling import Sampling
from mllm_jax.inference.session import Session
from mllm_jax.inference.stream import answer_text
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import current_row_shards


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
    stop_text: str | Sequence[str] = "",
    buckets: Sequence[int] = DEFAULT_BUCKETS,
    threads: int = 4,
    on_batch: Callable[[int], None] | None = None,
    sampling: Sampling | BeamSampling | None = None,
    prefill_bytes: int | None = None,
) -> Iterator[Generation]:
    """Answers requests greedily (or as `sampling` says), in the order in which they come.

    Requests are read ahead in chunks (at most 32 batches, fewer where the images need much memory); in a
    chunk the images' prefixes are computed once and the rest is sorted by length.

    Args:
      requests: prompts; a generator is read in a background thread.
      tokenizer: a Hugging Face tokenizer, for decoding.
      load_image: image key and layout -> the image's slots uint8[n, S, S, 3], thread-safe.
      max_new_tokens: N, at most so many tokens per answer.
      batch_size: rows at once, rounded up to a multiple of the devices that share them; the last batch of a
        chunk is filled with empty rows. Of sampled beams each is a row, so that there are fewer questions.
      stop_ids: ids that end an answer (`tokens.stop_ids`).
      stop_text: one or more texts that end an answer, for templates that close with text (`###`, a newline).
      buckets: lengths to which what follows the last image is padded.
      threads: threads that load images.
      on_batch: told after each batch how many requests it finished.
      sampling: draw the answers instead; the draws belong to a request's id, not to its place.
      prefill_bytes: memory on every device for reading prompts, the cache not counted; None = 256 MB on CPUs, 2 GB on
        accelerators.

    Raises:
      SampleTooLong: prompt and answer together exceed the LLM's context; names the request.
      SampleError: a prompt's visual tokens do not fit its images.
      ValueError: a size below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    beams = sampling if isinstance(sampling, BeamSampling) else None
    session = Session(config, params, stop_ids=stop_ids, prefill_bytes=prefill_bytes)
    stop_texts = [text for text in ([stop_text] if isinstance(stop_text, str) else stop_text) if text]

    def fitting_requests() -> Iterator[Request]:
        limit = config.llm.max_positions
        for request in requests:
            if len(request.prompt) + max_new_tokens > limit:
                raise SampleTooLong(request.id, len(request.prompt) + max_new_tokens, limit)
            yield request

    def answer(prompts: PromptBatch) -> list[Generation]:
        if beams is not None:
            found = _beams(session, beams, prompts, max_new_tokens)
        else:
            found = session.answer(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
        answers = []
        for request, tokens, count, stopped in zip(prompts.requests, *found, strict=False):
            ids = tuple(tokens[:count].tolist())
            text, cut = answer_text(tokenizer, ids, stop_texts)
            answers.append(Generation(request.id, ids, text, bool(stopped) or cut))
        return answers

    rows = batch_size if beams is None else max(1, batch_size // beams.beams)
    yield from answer_in_order(
        session.config,
        params,
        fitting_requests(),
        answer,
        load_image=load_image,
        batch_size=rows + -rows % current_row_shards(),
        buckets=buckets,
        threads=threads,
        limit=session.limit,
        on_batch=on_batch,
    )


def _beams(
    session: Session, sampling: BeamSampling, prompts: PromptBatch, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, N], how many of them count, and whether the answer ended by a stop id."""
    keys = np.zeros((len(prompts.lengths), 2), np.uint32)
    for row, request in enumerate(prompts.requests):
        keys[row] = sampling.key(request.id)
    visual, cache = prompts.open_cache(prompts.rows.tokens.shape[1] + max_new_tokens)
    found = sample_answers(
        session.config,
        dataclasses.replace(sampling, seed=0),  # the keys hold it; nothing is compiled per seed
        max_new_tokens,
        session.limit,
        session.params,
        prompts.rows,
        prompts.lengths,
        visual,
        cache,
        session.stops,
        keys,
    )
    return jax.device_get(found)
