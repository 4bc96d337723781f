"""Captions of mini-world scenes: long ones that say everything, short ones that say the gist.

All words come from the class lists of `scene` and the templates here; lower case, punctuation only `.,:`.
"""

import dataclasses

import numpy as np

from mllm_jax.mini.world.scene import Scene, Thing

STYLE_PHRASES = {
    "flat": "flat drawing",
    "sketch": "sketch",
    "mosaic": "mosaic",
    "painting": "painting",
}
SCENE_PHRASES = {
    "beach": "a beach",
    "forest": "a forest",
    "city": "a city",
    "desert": "a desert",
    "snow": "snow",
    "space": "space",
    "plain": "a plain background",
}
LIGHTING_PHRASES = {"day": "in the day", "sunset": "at sunset", "night": "at night"}

TOPIC_PHRASES = {"shapes": "shapes", "numbers": "numbers", "words": "words", "chart": "a chart"}

# {quality} {style} {scene} {light} {topic}
LONG_FRAMES = (
    "a {quality} {style} of {scene}{light} with {topic}.",
    "this is a {quality} {style} with {topic}. the scene is {scene}{light}.",
    "the picture is a {quality} {style}. it shows {scene}{light}. the topic is {topic}.",
    "{scene}{light}, shown in a {quality} {style}. the topic is {topic}.",
)
COUNT_FRAMES = (
    "there {are} {n} {shapes}.",
    "it has {n} {shapes}.",
    "the picture shows {n} {shapes}.",
)
CHART_FRAMES = (
    "the chart has {n} bars from left to right: {bars}.",
    "there is a chart with {n} bars: {bars}.",
)
NOUN_FRAMES = {
    "shape": "{size} {color} {shape}",
    "digit": "number {digit} on a {size} {color} card",
    "word": "word {word} on a {color} card",
    "bar": "{color} {value}",
}
PLACE_FRAME = "{article} {noun} at the {position}"
SHORT_FRAMES = (
    "a {style} of {scene}{light} with {thing}.",
    "{thing} and {scene}{light}.",
    "a {quality} {style} with {thing}.",
    "{scene}{light} with {thing}.",
)


def has_lighting(scene: Scene) -> bool:
    """Whether lighting means something in the scene (it does not on a plain background or in space)."""
    return scene.background not in ("plain", "space")


def noun(thing: Thing) -> str:
    """The thing in words without its place, e.g. "large red star" or "number 7 on a small blue card"."""
    return NOUN_FRAMES[thing.kind].format(**dataclasses.asdict(thing))


def phrase(thing: Thing) -> str:
    """The thing in words with its article and its place."""
    article = "a" if thing.kind == "shape" else "the"
    return PLACE_FRAME.format(article=article, noun=noun(thing), position=thing.position)


def _rng(scene: Scene, rng: np.random.Generator | None) -> np.random.Generator:
    return np.random.default_rng(scene.texture) if rng is None else rng


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _slots(scene: Scene) -> dict[str, str]:
    return {
        "quality": scene.quality,
        "style": STYLE_PHRASES[scene.style],
        "scene": SCENE_PHRASES[scene.background],
        "light": " " + LIGHTING_PHRASES[scene.lighting] if has_lighting(scene) else "",
        "topic": TOPIC_PHRASES[scene.topic],
    }


def long_caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A dense caption: scene, lighting, style, quality, topic, counts and every thing with its place.

    Everything that `questions.make_questions` asks can be answered from it.

    Args:
        scene: what to describe.
        rng: picks the phrasing; without it the scene's own texture seed does.
    """
    rng = _rng(scene, rng)
    parts = [_pick(rng, LONG_FRAMES).format(**_slots(scene))]
    n = len(scene.shapes)
    plural, are = ("shape", "is") if n == 1 else ("shapes", "are")
    parts.append(_pick(rng, COUNT_FRAMES).format(n=n, shapes=plural, are=are))
    things = scene.of_kind("shape", "digit", "word")
    if things:
        parts.append(", ".join(phrase(t) for t in things) + ".")
    if scene.bars:
        bars = ", ".join(noun(b) for b in scene.bars)
        parts.append(_pick(rng, CHART_FRAMES).format(n=len(scene.bars), bars=bars))
    return " ".join(parts)


def short_caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A one-sentence caption: the scene and one thing in it."""
    rng = _rng(scene, rng)
    things = scene.of_kind("shape", "digit", "word")
    if scene.bars:
        thing = f"a chart with {len(scene.bars)} bars"
    else:
        chosen = _pick(rng, things)
        thing = ("a " if chosen.kind == "shape" else "the ") + noun(chosen)
    return _pick(rng, SHORT_FRAMES).format(thing=thing, **_slots(scene))
