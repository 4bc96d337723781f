"""Notes: a scene written as a lattice of bags of words, the text that is nearest to what a connector will give.

Each cell of the lattice holds the words for what is there: of a thing its size, color, kind and place, elsewhere
the scene, its style and its counts. The LLM reads a cell as one position, whose embedding is the sum of its words'
embeddings over the square root of their number. Notes come from the scene's description alone: no image is rendered
and no tower is run. A connector that maps patches to words then finds an LLM that can already read them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from mllm_jax.data.conversations import Span, Turn, render
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.tokens import EncodedSample, encode_sample
from mllm_jax.mini.world import ABILITIES, Scene, long_caption, make_questions, sample_scene
from mllm_jax.mini.world.captions import has_lighting
from mllm_jax.mini.world.questions import PLURALS, Question
from mllm_jax.mini.world.sampler import dense_scene
from mllm_jax.mini.world.scene import COLORS, Thing
from mllm_jax.mini.world.targets import patch_owners
from mllm_jax.mini.world.text import CAPTION_PROMPTS, ask

WORDS_PER_CELL = 10
COARSE = 0.2  # share of the questions about the whole image that are kept: they are learned first
KEEP_THING, KEEP_BACKGROUND = 0.85, 0.6  # chance of each word to be written down


def thing_words(scene: Scene, thing: Thing) -> list[str]:
    """The words of a cell that shows `thing`."""
    where = thing.position.split(" ")
    if thing.kind == "shape":
        same = sum(t.shape == thing.shape for t in scene.shapes)
        return [thing.size, thing.color, thing.shape, "shape", *where, str(same), PLURALS[thing.shape]]
    if thing.kind == "digit":
        return ["number", str(thing.digit), thing.color, "card", *where]
    if thing.kind == "word":
        return ["word", thing.word, thing.color, "card", *where]
    return [thing.color, "bar", str(thing.value)]


def background_words(scene: Scene) -> list[str]:
    """The words of a cell that shows nothing in particular."""
    light = [scene.lighting] if has_lighting(scene) else []
    bars = [str(len(scene.bars)), "bars"] if scene.bars else [str(len(scene.shapes)), "shapes"]
    return [scene.background, *light, scene.style, scene.quality, "topic", scene.topic, *bars]


def cells(
    scene: Scene, grid: int, rng: np.random.Generator, tokenizer: Any, keep: float = KEEP_THING
) -> Int32[np.ndarray, "cells words"]:
    """The scene as bags of token ids, int32 [grid * grid, WORDS_PER_CELL] in raster order, 0 where there is none.

    Each word of a thing is written into a cell with the chance `keep`, but the cell of its center has all of them.
    """
    table = np.zeros((1 + len(scene.things), WORDS_PER_CELL), np.int32)
    for row, words in enumerate(
        [background_words(scene), *(thing_words(scene, thing) for thing in scene.things)]
    ):
        ids = [i for word in words for i in word_ids(tokenizer, word)]
        table[row, : len(ids)] = ids
    owners = patch_owners(scene, grid)
    bags = table[owners]
    chance = np.where(owners == 0, KEEP_BACKGROUND, keep)
    for number, thing in enumerate(scene.things, start=1):
        center = min(int(thing.y * grid), grid - 1) * grid + min(int(thing.x * grid), grid - 1)
        if owners[center] == number:
            chance[center] = 1
    bags[rng.random(bags.shape) >= chance[:, None]] = 0
    return bags


def turns_of(pairs: Sequence[tuple[str, str]]) -> list[Turn]:
    """(human, gpt) texts as turns without images."""
    return [Turn(role, (text,)) for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]


@functools.lru_cache(maxsize=4096)
def word_ids(tokenizer: Any, word: str) -> tuple[int, ...]:
    """The ids of a word as it stands inside a text."""
    return tuple(tokenizer(" " + word, add_special_tokens=False).input_ids)


@dataclasses.dataclass(frozen=True, eq=False)
class NotedSample:
    """An encoded conversation and the bags of its visual positions, int32 [cells, WORDS_PER_CELL]."""

    encoded: EncodedSample
    bags: Int32[np.ndarray, "cells words"]

    def __len__(self) -> int:
        return len(self.encoded)


def pick(scene: Scene, rng: np.random.Generator, most: int, abilities: Sequence[str]) -> list[Question]:
    """At most `most` different questions about a scene, of the given abilities (none: of all).

    Those about the whole image are thinned out.
    """
    everything = {q.text: q for _ in range(1 + most // 4) for q in make_questions(scene, rng)}
    asked = [
        q
        for q in everything.values()
        if (q.ability in abilities or not abilities)
        and (ABILITIES[q.ability].group != "coarse" or rng.random() < COARSE)
    ]
    return [asked[i] for i in rng.permutation(len(asked))[:most]] or list(everything.values())[:1]


def noted_scene(seed: int, index: int, most: int, crowded: bool) -> Scene:
    """A scene of the split "foundation" with at most `most` things, and as many bars.

    Args:
      seed, index: as for `sample_scene`.
      most: at least 2, as some questions are about two bars.
      crowded: whether it is one of the crowded scenes, of which every word card but one is left out: questions tell
        cards with numbers apart by color, and there is one word to read.
    """
    scene = dense_scene(seed, index) if crowded else sample_scene(seed, index, "foundation")
    things = [*scene.of_kind("shape", "digit"), *scene.of_kind("word")[:1]]
    rng = np.random.default_rng([0x5CE7E, seed, index])

    def few(kept: Sequence[Thing]) -> set[int]:
        return {id(kept[i]) for i in rng.permutation(len(kept))[:most]}

    chosen = few(things) | few(scene.bars)
    return dataclasses.replace(scene, things=tuple(t for t in scene.things if id(t) in chosen))


def drill(pairs: Sequence[tuple[str, str]]) -> list[Span]:
    """Questions about one image, each followed at once by its answer; see `drilled_text`.

    An answer then takes one look into the note, at the name that stands before it, and where the color is last it takes
    that one word. In a conversation a thing is looked up at its name and fetched from there at the end of the prompt,
    and the card of "red card" is looked up with a word that was fetched before. No such step is of use without the
    next, so a model that starts with conversations learns none of them for hundreds of steps.
    """
    spans = [Span("<image>", image=True)]
    for question, answer in pairs:
        spans += [Span(f" {question}"), Span(f" {answer}", learn=True)]
    return spans


def drilled_text(question: str, rng: np.random.Generator) -> str:
    """A question without its end, every other time with the color last in what it names ("card red")."""
    text = question.rstrip("?.")
    return _COLORED.sub(r"\2 \1", text) if rng.random() < 0.5 else text


_COLORED = re.compile(rf"\b({'|'.join(COLORS)}) (\w+)")


def fit_turns(
    pairs: list[tuple[str, str]], length: int, encode: Callable[[list[tuple[str, str]]], EncodedSample]
) -> EncodedSample:
    """The conversation with as many of its questions, at least one, as fit into `length` tokens."""
    encoded = encode(pairs)
    if len(encoded) <= length:
        return encoded
    learned = np.append(encoded.loss_weights > 0, False)
    ends = 1 + np.flatnonzero(learned[:-1] & ~learned[1:])  # of the answers
    return encode(pairs[: max(np.searchsorted(ends, length, side="right"), 1)])


def note_sample(tokenizer: Any, seed: int, index: int, phase: Any) -> NotedSample:
    """A conversation about a scene given as notes.

    Args:
      tokenizer: whose words are written.
      seed: which stream.
      index: number of the conversation; its scene is of the split "foundation".
      phase: `things` and `crowded` (most things of a scene, share of crowded scenes, see `noted_scene`), `grids`
        (lattices, cells per side, of which one is drawn), `keep` (see `cells`), `questions` (at most so many are
        asked, and as fit into `length` tokens), `abilities` (that they test; () for all), `drill` (share of notes with
        a `drill` in place of a conversation), `bare` (share of a conversation's questions that are asked without
        options and without saying how to answer, in half the tokens), `describe` (share of the other conversations,
        those about crowded scenes apart, that ask for the long caption, half of them as the `plain` template does) and
        `describe_weight` (of a caption's tokens in the loss; there are many, and few depend on the notes).
    """
    rng = np.random.default_rng([0x207E5, seed, index])
    crowded = rng.random() < phase["crowded"]
    scene = noted_scene(seed, index, phase["things"], crowded)
    bags = cells(scene, int(rng.choice(phase["grids"])), rng, tokenizer, phase["keep"])
    drilled = rng.random() < phase["drill"]
    template, weight = "mini", 1.0
    if not (drilled or crowded) and rng.random() < phase["describe"]:
        pairs = [(CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))], long_caption(scene, rng))]
        template, weight = "plain" if rng.random() < 0.5 else "mini", phase["describe_weight"]
    else:
        asked = pick(scene, rng, phase["questions"], phase["abilities"])
        pairs = [ask(q, rng) if rng.random() >= phase["bare"] else (q.text, q.answer) for q in asked]
        if drilled:
            pairs = [(drilled_text(q.text, rng), q.answer) for q in asked]

    cells_layout = WholeImage(Slot(len(bags)))()  # the note stands for an image

    def encode(pairs: list[tuple[str, str]]) -> EncodedSample:
        turns = turns_of(pairs)
        turns[0] = Turn("human", ("", "\n" + pairs[0][0]))
        spans = drill(pairs) if drilled else render(template, turns)
        return encode_sample(spans, tokenizer, [cells_layout], sample=f"note {index}")

    encoded = fit_turns(pairs, phase["length"], encode)
    weights = (weight * encoded.loss_weights).astype(np.float32)
    return NotedSample(dataclasses.replace(encoded, loss_weights=weights), bags)
