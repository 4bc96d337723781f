"""Text-only pretraining of the mini LLM: descriptions in words, questions about them, no pictures."""

import dataclasses
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


def conversation(seed: int, index: int) -> list[tuple[str, str]]:
    """A conversation about a described scene, of four kinds in turn.

    Looking words up in the context is what all answers build on, and a small transformer learns it far sooner where
    the context is short: so half of the conversations are about scenes with at most three things, half of these
    without the sentences about the whole picture. One in ten asks to repeat the description.
    """
    kind = index % 10
    scene = sample_scene(seed, index, "foundation")
    if kind == 0:
        caption = long_caption(scene)
        return [(f"{caption}\nrepeat the description.", caption)]
    if kind > 5:
        return text_sample(seed, index)
    rng = np.random.default_rng([0x5407, seed, index])
    things = scene.of_kind("shape", "digit", "word")
    if not things:  # a chart alone
        return text_sample(seed, index)
    few = tuple(things[i] for i in sorted(rng.permutation(len(things))[: rng.integers(1, 4)]))
    scene = dataclasses.replace(scene, things=few)
    questions = make_questions(scene, rng)
    context = long_caption(scene, rng)
    if kind % 2:
        context = ", ".join(map(phrase, few)) + "."
        questions = [q for q in questions if ABILITIES[q.ability].group != "coarse"]
    if not questions:
        return text_sample(seed, index)
    chosen = [questions[i] for i in rng.permutation(len(questions))[:5]]
    turns = [ask(question, rng) for question in chosen]
    turns[0] = (f"{context}\n{turns[0][0]}", turns[0][1])
    return turns


def encode_text(tokenizer: Any, seed: int, index: int, context_weight: float) -> EncodedSample:
    """A conversation whose answers weigh 1 and whose other text weighs `context_weight` in the loss."""
    sample = encode_sample(
        render("mini", turns_of(conversation(seed, index))), tokenizer, [], sample=str(index)
    )
    weights = np.maximum(sample.loss_weights, context_weight).astype(np.float32)
    weights[:1] = 0
    return dataclasses.replace(sample, loss_weights=weights)


def packed_batches(
    tokenizer: Any, seed: int, batch: int, length: int, context_weight: float, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of packed conversations, endlessly; samples longer than a row are an error."""
    index = start
    waiting = encode_text(tokenizer, seed, index, context_weight)
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
                waiting = encode_text(tokenizer, seed, index, context_weight)
            rows.append(layout_row(samples, length, 1, 1))
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "slots"}
