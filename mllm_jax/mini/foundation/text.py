"""Text-only pretraining of the mini LLM: descriptions in sentences or notes, questions about them, no images."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mllm_jax.data.batch import Batch
from mllm_jax.data.conversations import render
from mllm_jax.data.tokens import EncodedSample, SampleTooLong, encode_sample, layout_row
from mllm_jax.mini.foundation.notes import WORDS_PER_CELL, NotedSample, fit_turns, note_sample, turns_of
from mllm_jax.mini.world import ABILITIES, long_caption, make_questions, sample_scene, text_sample
from mllm_jax.mini.world.captions import phrase
from mllm_jax.mini.world.text import ask


def few_things(seed: int, index: int, most: int, questions: int) -> list[tuple[str, str]] | None:
    """Questions about a description of at most `most` things; None where a scene offers none.

    Looking words up in the context is what all answers build on, and a small transformer learns it far sooner where
    the context is short. Every other description leaves out the sentences about the whole image.
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
    """A conversation about a scene described in sentences.

    Args:
      short: up to three things, up to two questions. Else four conversations in ten are `few_things` and the rest are
        `mini_world.text_sample`.
    """
    if short:
        return few_things(seed, index, 1 + index % 3, 2) or text_sample(seed, index)[:1]
    return (few_things(seed, index, 3, 5) if index % 10 > 5 else None) or text_sample(seed, index)


def pretraining_sample(tokenizer: Any, seed: int, index: int, phase: Any) -> NotedSample:
    """Conversation `index` of a phase: about sentences, or about notes (see `packed_batches`).

    Its answers weigh 1 and its other text weighs `phase["context_weight"]` in the loss.
    """
    if np.random.default_rng([0x91C, seed, index]).random() < phase["notes"]:
        sample = note_sample(tokenizer, seed, index, phase)
    else:

        def encode(pairs: list[tuple[str, str]]) -> EncodedSample:
            return encode_sample(render("mini", turns_of(pairs)), tokenizer, [], sample=f"text {index}")

        encoded = fit_turns(conversation(seed, index, phase["short"]), phase["length"], encode)
        sample = NotedSample(encoded, np.zeros((0, WORDS_PER_CELL), np.int32))
    weights = np.maximum(sample.encoded.loss_weights, phase["context_weight"]).astype(np.float32)
    weights[:1] = 0
    weights[sample.encoded.image_of >= 0] = 0
    return NotedSample(dataclasses.replace(sample.encoded, loss_weights=weights), sample.bags)


def layout_notes(samples: Sequence[NotedSample], length: int) -> dict[str, np.ndarray]:
    """A packed row, as `data.tokens.layout_row` gives it, with `bags` int32 [T, WORDS_PER_CELL] at visual positions."""
    row, _ = layout_row([s.encoded for s in samples], Batch.spec(length=length, slots=len(samples)))
    bags = np.zeros((length, WORDS_PER_CELL), np.int32)
    bags[row.visual_index >= 0] = np.concatenate([sample.bags for sample in samples])
    names = ("tokens", "positions", "segment_ids", "loss_weights", "visual_index")
    return {name: getattr(row, name) for name in names} | {"bags": bags}


def packed_batches(
    tokenizer: Any, seed: int, phase: Any, first: int = 0, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of packed conversations, endlessly, from batch `start` on.

    Each batch has numbers of its own, so that a resumed run goes on with the batches of one in a piece.

    Args:
      phase: `batch` rows of `length` tokens, `context_weight` (loss weight of what is no answer), `notes` (share of
        conversations about notes; the others are about sentences), `short` (of sentences, see `conversation`), and
        what `note_sample` reads.
      first: number of the first conversation of batch 0.

    Raises:
      SampleTooLong: a conversation is longer than a row.
    """
    length, most = phase["length"], conversations(phase)
    for number in itertools.count(start):
        index, rows = first + number * most, []
        waiting = pretraining_sample(tokenizer, seed, index, phase)
        for _ in range(phase["batch"]):
            samples, used = [], 0
            if len(waiting) > length:
                raise SampleTooLong(waiting.encoded.sample, len(waiting), length)
            while used + len(waiting) <= length:
                samples.append(waiting)
                used += len(waiting)
                index += 1
                waiting = pretraining_sample(tokenizer, seed, index, phase)
            rows.append(layout_notes(samples, length))
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0]} | {"noise_seed": np.int32(index)}


LEAST_TOKENS = 16  # of a conversation


def conversations(phase: Any) -> int:
    """How many conversations a batch has at most."""
    return phase["batch"] * (phase["length"] // LEAST_TOKENS)
