"""The closed vocabulary of the mini world's texts: captions, questions, prompts and answers."""

import re
from string import Formatter

from mllm_jax.mini.world import captions, questions, scene, text

_TOKEN = re.compile(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]")


def words(string: str) -> list[str]:
    """The words and punctuation marks of a text, in order; white space is dropped."""
    return _TOKEN.findall(string)


def _templates() -> list[str]:
    """Every fixed string that texts are made of."""
    phrases = [
        captions.STYLE_PHRASES, captions.SCENE_PHRASES, captions.LIGHTING_PHRASES, captions.TOPIC_PHRASES,
        questions.PLURALS,
    ]  # fmt: skip
    return [
        *captions.LONG_FRAMES, *captions.COUNT_FRAMES, *captions.CHART_FRAMES, *captions.SHORT_FRAMES,
        *captions.NOUN_FRAMES.values(), captions.PLACE_FRAME, "a the is are shape shapes , .",
        *(phrase for table in phrases for phrase in table.values()),
        *(t for forms in questions.TEMPLATES.values() for t in forms),
        "thing shape card number word", f"{questions.OPEN_SUFFIX} {questions.CHOICE_SUFFIX}",
        *questions.LETTERS, *text.CONTINUE, *text.CAPTION_PROMPTS, *text.SHORT_CAPTION_PROMPTS,
    ]  # fmt: skip


def vocabulary() -> list[str]:
    """All words and punctuation marks that any text of the mini world can hold, sorted."""
    classes = [
        scene.SHAPES, scene.COLORS, scene.SCENES, scene.LIGHTING, scene.STYLES, scene.QUALITY, scene.TOPICS,
        scene.SIZES, scene.WORDS, scene.POSITIONS, questions.RELATIONS, questions.SUMS, (questions.SAME,),
        questions.EXTENTS.values(), questions.BAR_EXTENTS, questions.SIDES,
    ]  # fmt: skip
    found = {w for group in classes for item in group for w in words(item)}
    for template in _templates():
        found.update(w for literal, *_ in Formatter().parse(template) for w in words(literal))
    return sorted(found)
