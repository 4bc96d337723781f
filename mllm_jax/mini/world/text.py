"""Text without images, from which a mini LLM learns the mini world's language and question forms."""

import numpy as np

from mllm_jax.mini.world.captions import long_caption, short_caption
from mllm_jax.mini.world.questions import Question, make_questions, prompt_choice, prompt_open
from mllm_jax.mini.world.sampler import sample_scene
from mllm_jax.mini.world.scene import SPLITS, Scene

CONTINUE = ("complete the description:", "continue the text:", "go on:")
CAPTION_PROMPTS = (
    "describe the picture.",
    "describe the picture in detail.",
    "what does the picture show?",
    "tell all about the picture.",
)
SHORT_CAPTION_PROMPTS = ("describe the picture in short.", "give a short description of the picture.")


# Roughly one over the share of scenes an ability applies to, so that all are asked for about equally often.
_WEIGHTS = {
    "scene": 0.5,
    "style": 1.0,
    "topic": 1.0,
    "quality": 1.0,
    "localization": 0.9,
    "attribute": 1.0,
    "counting": 1.3,
    "reading": 2.4,
    "spatial_relation": 2.0,
    "comparison": 3.0,
    "arithmetic": 4.0,
    "structured_reading": 5.0,
}


def pick_questions(scene: Scene, rng: np.random.Generator, n: int) -> list[Question]:
    """At most `n` questions about a scene, in random order; abilities that seldom apply are preferred."""
    pools: dict[str, list[Question]] = {}
    for question in make_questions(scene, rng):
        pools.setdefault(question.ability, []).append(question)
    chosen: list[Question] = []
    while pools and len(chosen) < n:
        names = list(pools)
        weights = np.cumsum([_WEIGHTS[name] for name in names])
        name = names[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
        chosen.append(pools[name].pop(int(rng.integers(len(pools[name])))))
        if not pools[name]:
            del pools[name]
    return chosen


def ask(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """The (human, gpt) turn of a question: open or multiple choice at random."""
    prompt = prompt_choice(question) if rng.random() < 0.5 else prompt_open(question)
    return prompt, question.answer


def text_sample(seed: int, index: int, split: str = "foundation") -> list[tuple[str, str]]:
    """A conversation without an image, as (human, gpt) turns.

    Most give a scene's long caption followed by questions about it; the rest ask to complete a caption.

    Args:
        seed: which stream.
        index: number of the sample.
        split: split of the scenes that are described.
    """
    scene = sample_scene(seed, index, split)
    rng = np.random.default_rng(np.random.SeedSequence([0x7E87, SPLITS.index(split), seed, index]))
    caption = long_caption(scene, rng)
    if rng.random() < 0.2:
        words = caption.split(" ")
        cut = int(rng.integers(3, max(len(words) - 3, 4)))
        prompt = CONTINUE[int(rng.integers(len(CONTINUE)))]
        return [(f"{prompt} {' '.join(words[:cut])}", " ".join(words[cut:]))]
    turns = [ask(q, rng) for q in pick_questions(scene, rng, int(rng.integers(3, 8)))]
    turns[0] = (f"{caption}\n{turns[0][0]}", turns[0][1])
    return turns


def caption_sample(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A (human, gpt) caption turn: usually the long caption, now and then the short one."""
    if rng.random() < 0.15:
        prompts, caption = SHORT_CAPTION_PROMPTS, short_caption(scene, rng)
    else:
        prompts, caption = CAPTION_PROMPTS, long_caption(scene, rng)
    return prompts[int(rng.integers(len(prompts)))], caption
