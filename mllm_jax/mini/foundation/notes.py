"""Notes: a scene written as a lattice of bags of words, the text that is nearest to what a connector will give.

Each cell of the lattice holds the words for what is there: of a thing its size, color, kind and place, elsewhere
the scene, its style and its counts. The LLM reads a cell as one position, whose embedding is the sum of its words'
embeddings over the square root of their number. Notes come from the scene's description alone: no image is rendered
and no tower is run. A connector that maps patches to words then finds an LLM that can already read them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from mllm_jax.data.conversations import Turn, render
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.tokens import EncodedSample, encode_sample
from mllm_jax.mini.world import ABILITIES, Scene, long_caption, make_questions, sample_scene
from mllm_jax.mini.world.captions import has_lighting
from mllm_jax.mini.world.questions import PLURALS, Question
from mllm_jax.mini.world.scene import Thing
from mllm_jax.mini.world.targets import patch_owners
from mllm_jax.mini.world.text import CAPTION_PROMPTS, ask

WORDS_PER_CELL = 10
# Share of the questions that are kept: those about the whole image are learned first, those for a color last.
COARSE, OTHERS = 0.2, 0.5
COLOR_FORMS = ("color", "extreme_color", "extent_color", "bar_extreme")
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
    scene: Scene, grid: int, rng: np.random.Generator, tokenizer: Any
) -> Int32[np.ndarray, "cells words"]:
    """The scene as bags of token ids, int32 [grid * grid, WORDS_PER_CELL] in raster order, 0 where there is none."""
    table = np.zeros((1 + len(scene.things), WORDS_PER_CELL), np.int32)
    for row, words in enumerate(
        [background_words(scene), *(thing_words(scene, thing) for thing in scene.things)]
    ):
        ids = [i for word in words for i in word_ids(tokenizer, word)]
        table[row, : len(ids)] = ids
    owners = patch_owners(scene, grid)
    bags = table[owners]
    keep = np.where(owners == 0, KEEP_BACKGROUND, KEEP_THING)[:, None]
    bags[rng.random(bags.shape) >= keep] = 0
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


def pick(scene: Scene, rng: np.random.Generator, most: int) -> list[Question]:
    """At most `most` questions about a scene; those that are learned early are thinned out."""
    everything = make_questions(scene, rng)
    asked = [q for q in everything if rng.random() < _share(q)]
    return [asked[i] for i in rng.permutation(len(asked))[:most]] or everything[:1]


def _share(question: Question) -> float:
    if question.form in COLOR_FORMS:
        return 1.0
    return COARSE if ABILITIES[question.ability].group == "coarse" else OTHERS


def fit_turns(
    pairs: list[tuple[str, str]], length: int, encode: Callable[[list[tuple[str, str]]], EncodedSample]
) -> EncodedSample:
    """The conversation with as many of its questions, at least one, as fit into `length` tokens."""
    for count in range(len(pairs), 0, -1):
        encoded = encode(pairs[:count])
        if len(encoded) <= length:
            break
    return encoded


def note_sample(tokenizer: Any, seed: int, index: int, phase: Any) -> NotedSample:
    """A conversation about a scene given as notes.

    Args:
      tokenizer: whose words are written.
      seed: which stream.
      index: number of the conversation; its scene is of the split "foundation".
      phase: `things` (at most so many of a scene are kept, bars apart), `grids` (lattices, cells per side, of which
        one is drawn), `questions` (at most so many are asked, and as fit into `length` tokens), `describe` (share of
        conversations that ask for the long caption instead, half of them as the `plain` template does) and
        `describe_weight` (of a caption's tokens in the loss; there are many, and few depend on the notes).
    """
    rng = np.random.default_rng([0x207E5, seed, index])
    scene = sample_scene(seed, index, "foundation")
    things = scene.of_kind("shape", "digit", "word")
    few = [things[i] for i in sorted(rng.permutation(len(things))[: phase["things"]])]
    scene = dataclasses.replace(scene, things=(*few, *scene.bars))
    bags = cells(scene, int(rng.choice(phase["grids"])), rng, tokenizer)
    template, weight = "mini", 1.0
    if rng.random() < phase["describe"]:
        pairs = [(CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))], long_caption(scene, rng))]
        template, weight = "plain" if rng.random() < 0.5 else "mini", phase["describe_weight"]
    else:
        pairs = [ask(question, rng) for question in pick(scene, rng, phase["questions"])]

    cells_layout = WholeImage(Slot(len(bags)))()  # the note stands for an image

    def encode(pairs: list[tuple[str, str]]) -> EncodedSample:
        turns = turns_of(pairs)
        turns[0] = Turn("human", ("", "\n" + pairs[0][0]))
        return encode_sample(render(template, turns), tokenizer, [cells_layout], sample=f"note {index}")

    encoded = fit_turns(pairs, phase["length"], encode)
    weights = (weight * encoded.loss_weights).astype(np.float32)
    return NotedSample(dataclasses.replace(encoded, loss_weights=weights), bags)
