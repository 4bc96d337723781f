"""Text-only pretraining of the mini LLM: descriptions in words, questions about them, no pictures."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mllm_jax.data.conversations import Turn, render
from mllm_jax.data.mini_world import ABILITIES, long_caption, make_questions, sample_scene, text_sample
from mllm_jax.data.mini_world.captions import phrase
from mllm_jax.data.mini_world.text import ask
from mllm_jax.data.tokens import EncodedSample, SampleTooLong, encode_sample, layout_row


def turns_of(pairs: Sequence[tuple[str, str]]) -> list[Turn]:
    """(human, gpt) texts as turns without images."""
    return [Turn(role, (text,)) for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]


def few_things(seed: int, index: int, most: int, questions: int) -> list[tuple[str, str]] | None:
    """Questions about a description of at most `most` things; None where a scene offers none.

    Looking words up in the context is what all answers build on, and a small transformer learns it far sooner where
    the context is short. Every other description leaves out the sentences about the whole picture.
    """
    scene = sample_scene(seed, index, "foundation")
    rng = np.random.default_rng([0x5407, seed, index])
    things = scene.of_kind("shape", "digit", "word")
    if not things:  # a chart alone
        return None
    few = tuple(things[i] for i in sorted(rng.permutation(len(things))[: rng.integers(1, most + 1)]))
    scene = dataclasses.replace(scene, things=few)
    asked = make_questions(scene, rng)
    context = long_caption(scene, rng)
    if index % 2:
        context = ", ".join(map(phrase, few)) + "."
        asked = [q for q in asked if ABILITIES[q.ability].group != "coarse"]
    if not asked:
        return None
    turns = [ask(asked[i], rng) for i in rng.permutation(len(asked))[:questions]]
    turns[0] = (f"{context}\n{turns[0][0]}", turns[0][1])
    return turns


def conversation(seed: int, index: int, short: bool) -> list[tuple[str, str]]:
    """A conversation about a described scene.

    Args:
      short: the first phase of pretraining: up to three things, up to two questions. Else half of the conversations are
        `few_things`, one in ten repeats a description, and the rest are `mini_world.text_sample`.
    """
    if short:
        return few_things(seed, index, 1 + index % 3, 2) or text_sample(seed, index)[:1]
    if index % 10 == 0:
        caption = long_caption(sample_scene(seed, index, "foundation"))
        return [(f"{caption}\nrepeat the description.", caption)]
    return (few_things(seed, index, 3, 5) if index % 10 > 5 else None) or text_sample(seed, index)


def encode_text(
    tokenizer: Any, seed: int, index: int, context_weight: float, short: bool = False
) -> EncodedSample:
    """A conversation whose answers weigh 1 and whose other text weighs `context_weight` in the loss."""
    sample = encode_sample(
        render("mini", turns_of(conversation(seed, index, short))), tokenizer, [], sample=str(index)
    )
    weights = np.maximum(sample.loss_weights, context_weight).astype(np.float32)
    weights[:1] = 0
    return dataclasses.replace(sample, loss_weights=weights)


def packed_batches(
    tokenizer: Any, seed: int, batch: int, length: int, context_weight: float, short: bool, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of packed conversations, endlessly, from sample `start` on; one longer than a row is an error."""
    index = start
    waiting = encode_text(tokenizer, seed, index, context_weight, short)
    while True:
        rows = []
        for _ in range(batch):
            samples, used = [], 0
            if len(waiting) > length:
                raise SampleTooLong(waiting.sample, len(waiting), length)
            while used + len(waiting) <= length:
                samples.append(waiting)
                used += len(waiting)
                index += 1
                waiting = encode_text(tokenizer, seed, index, context_weight, short)
            rows.append(layout_row(samples, length, 1, 1))
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "slots"}


def phased_batches(
    tokenizer: Any, seed: int, phases: Sequence[Any], first: int, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of all phases one after the other, from update `start` on.

    Args:
      phases: each with `steps`, `batch`, `length`, `context_weight` and `short`.
      first: number of the first conversation.
    """
    begin = 0
    for phase in phases:
        first_update = max(start, begin)
        if first_update < begin + phase["steps"]:
            # A batch uses at most so many conversations; a resumed run leaves some out but repeats none.
            most = phase["batch"] * (phase["length"] // 24)
            options = {key: phase[key] for key in ("batch", "length", "context_weight", "short")}
            packed = packed_batches(tokenizer, seed, **options, start=first + first_update * most)
            yield from itertools.islice(packed, begin + phase["steps"] - first_update)
        begin += phase["steps"]
        first += phase["steps"] * 1000
