"""Questions about mini-world scenes: twelve abilities, four per group, answered in one or two words.

Each ability stands in for an axis of the radar chart of "To Preserve or To Compress" (its MMBench/SEED style
split into coarse-grained, fine-grained and reasoning tasks). Only what has exactly one right answer is asked,
and every answer can also be derived from the scene's long caption.
"""

import dataclasses

import numpy as np

from mllm_jax.mini.world.captions import has_lighting
from mllm_jax.mini.world.scene import (
    COLORS,
    LIGHTING,
    MAX_BAR,
    POSITIONS,
    QUALITY,
    SCENES,
    SHAPES,
    SIZES,
    STYLES,
    TOPICS,
    WORDS,
    Scene,
    Thing,
)


@dataclasses.dataclass(frozen=True)
class Ability:
    """Where an ability belongs: its group ("coarse", "fine", "reasoning") and the paper's axis."""

    group: str
    axis: str


ABILITIES: dict[str, Ability] = {
    "scene": Ability("coarse", "image_scene"),
    "style": Ability("coarse", "image_style"),
    "topic": Ability("coarse", "image_topic"),
    "quality": Ability("coarse", "image_quality"),
    "localization": Ability("fine", "object_localization"),
    "attribute": Ability("fine", "celebrity_recognition"),  # recognise one small thing
    "counting": Ability("fine", "action_recognition"),
    "reading": Ability("fine", "ocr"),
    "spatial_relation": Ability("reasoning", "social_relation"),
    "comparison": Ability("reasoning", "identity_reasoning"),
    "arithmetic": Ability("reasoning", "function_reasoning"),
    "structured_reading": Ability("reasoning", "structuralized_imagetext_understanding"),
}
GROUPS = ("coarse", "fine", "reasoning")

RELATIONS = ("left", "right", "above", "below")
COUNTS = tuple(str(n) for n in range(1, 7))
SUMS = tuple(str(n) for n in range(19))
DIGITS = tuple(str(n) for n in range(10))
BAR_VALUES = tuple(str(n) for n in range(1, MAX_BAR + 1))
BAR_DIFFERENCES = tuple(str(n) for n in range(MAX_BAR))
OPTIONS = 4
LETTERS = "ABCD"

OPEN_SUFFIX = "Answer the question using a single word or phrase."
CHOICE_SUFFIX = "Answer with one of the options."

# form -> phrasings; {a}, {b} are descriptions of things, {x} a class word
TEMPLATES: dict[str, tuple[str, ...]] = {
    "scene": ("what scene is this?", "which scene does the picture show?", "where is this?"),
    "lighting": ("what time of day is it?", "is it day, sunset or night?", "what is the light of the scene?"),
    "style": ("what style is the picture?", "which style was used?", "in what style is this shown?"),
    "topic": ("what is the topic of the picture?", "what is this picture about?", "which topic is shown?"),
    "quality": (
        "how good is the quality?",
        "what is the quality of the picture?",
        "how is the picture quality?",
    ),
    "location": ("where is the {a}?", "in which place is the {a}?", "what is the place of the {a}?"),
    "color": ("what color is the {a}?", "which color has the {a}?"),
    "shape": ("what shape is the {a}?", "which shape has the {a}?"),
    "size": ("what size is the {a}?", "is the {a} small or large?"),
    "count_shapes": ("how many shapes are there?", "what is the number of shapes?"),
    "count": ("how many {x} shapes are there?", "what is the number of {x} shapes?"),
    "count_kind": ("how many {x} are there?", "what is the number of {x}?"),
    "count_bars": ("how many bars are in the chart?", "what is the number of bars?"),
    "read_word": ("what word is written?", "which word is on the card?", "read the word."),
    "read_digit": ("what number is on the {x} card?", "read the number on the {x} card."),
    "relation": ("where is the {a} relative to the {b}?", "on which side of the {b} is the {a}?"),
    "extreme_color": (
        "what color is the shape most to the {x}?",
        "which color has the shape at the far {x}?",
    ),
    "extreme_shape": ("which shape is most to the {x}?", "what shape is at the far {x}?"),
    "extent_color": ("what color is the {x} shape?", "which color has the {x} shape?"),
    "extent_shape": ("what is the {x} shape?", "which shape is the {x}?"),
    "majority": ("are there more {a} or {b}?", "which are more, {a} or {b}?"),
    "sum": ("what is the sum of the numbers?", "add the two numbers.", "what do the numbers add up to?"),
    "difference": ("what is the difference of the numbers?", "how far apart are the two numbers?"),
    "larger": ("which number is larger?", "what is the larger number?"),
    "bar_value": ("how tall is the {x} bar?", "what is the value of the {x} bar?"),
    "bar_extreme": ("which bar is the {x}?", "what color is the {x} bar?"),
    "bar_difference": (
        "how much taller is the {a} bar than the {b} bar?",
        "what is the difference of the {a} bar and the {b} bar?",
    ),
}
PLURALS = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "rectangle": "rectangles",
    "star": "stars", "diamond": "diamonds", "cross": "crosses", "heart": "hearts",
}  # fmt: skip
SAME = "same"
EXTENTS = {"large": "largest", "small": "smallest"}  # the size that is the odd one -> how it is asked for
BAR_EXTENTS = ("tallest", "shortest")
SIDES = ("left", "right", "top", "bottom")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its one right answer.

    Attributes:
        ability: a key of `ABILITIES`.
        text: the question, lower case.
        answer: one or two words.
        options: distinct plausible answers in random order, the right one among them: four, or fewer where
            the answer space is smaller.
        form: which template of `TEMPLATES` it comes from.
    """

    ability: str
    text: str
    answer: str
    options: tuple[str, ...]
    form: str


def prompt_open(question: Question) -> str:
    """The question as an open prompt, answered by a word or phrase."""
    return f"{question.text}\n{OPEN_SUFFIX}"


def prompt_choice(question: Question, options: tuple[str, ...] | list[str] | None = None) -> str:
    """The question with lettered options; the answer is still the option's words, not its letter."""
    options = question.options if options is None else options
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question.text}\n{lines}\n{CHOICE_SUFFIX}"


def rotations(options: tuple[str, ...] | list[str]) -> list[tuple[str, ...]]:
    """All rotations of the options, for circular evaluation (a question counts if all are answered right)."""
    return [tuple(options[k:]) + tuple(options[:k]) for k in range(len(options))]


class _Maker:
    """Makes the questions of one scene, one or more per ability that applies."""

    def __init__(self, scene: Scene, rng: np.random.Generator):
        self.scene, self.rng = scene, rng
        self.questions: list[Question] = []

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def shuffled(self, items) -> list:
        return [items[int(i)] for i in self.rng.permutation(len(items))]

    def add(self, ability: str, form: str, answer: str, space, **slots: str) -> None:
        """Adds a question whose wrong options are drawn evenly from the answer space."""
        text = self.pick(TEMPLATES[form]).format(**slots)
        wrong = self.shuffled([s for s in space if s != answer])[: OPTIONS - 1]
        options = tuple(self.shuffled([answer, *wrong]))
        self.questions.append(Question(ability, text, answer, options, form))

    # --- how a thing is named so that it is the only one meant ---

    def names(self, thing: Thing, without: str = "") -> list[str]:
        """Unambiguous names of a thing that do not mention its attribute `without`."""
        if thing.kind != "shape":
            others = [t for t in self.scene.of_kind("digit", "word") if t is not thing]
            if thing.kind == "word":
                return ["word"]
            named = [] if without == "digit" or any(t.digit == thing.digit for t in others) else [
                f"number {thing.digit}"
            ]  # fmt: skip
            if without != "color" and all(t.color != thing.color for t in others):
                named.append(f"{thing.color} card")
            return named
        shapes, found = self.scene.shapes, []
        alone = without != "color" and sum(t.color == thing.color for t in shapes) == 1
        if without == "shape":
            if alone and all(t.color != thing.color for t in self.scene.of_kind("digit", "word", "bar")):
                found.append(f"{thing.color} thing")
            return found
        if sum(t.shape == thing.shape for t in shapes) == 1:
            found.append(thing.shape)
        same = [t for t in shapes if (t.shape, t.color) == (thing.shape, thing.color)]
        if without != "color" and len(same) == 1:
            found.append(f"{thing.color} {thing.shape}")
        if alone:
            found.append(f"{thing.color} shape")
        return found

    # --- coarse ---

    def coarse(self) -> None:
        scene = self.scene
        self.add("scene", "scene", scene.background, SCENES)
        if has_lighting(scene):
            self.add("scene", "lighting", scene.lighting, LIGHTING)
        self.add("style", "style", scene.style, STYLES)
        self.add("topic", "topic", scene.topic, TOPICS)
        self.add("quality", "quality", scene.quality, QUALITY)

    # --- fine ---

    def localization(self) -> None:
        for thing in self.shuffled(self.scene.of_kind("shape", "digit", "word"))[:2]:
            if names := self.names(thing):
                self.add("localization", "location", thing.position, POSITIONS, a=self.pick(names))

    def attribute(self) -> None:
        shapes = self.scene.shapes
        # Small things first: recognising one of them is what this ability is about.
        order = sorted(self.shuffled(shapes), key=lambda t: t.size == "large")
        for thing in order[:2]:
            form, space = self.pick((("color", COLORS), ("shape", SHAPES)))
            names = self.names(thing, without=form)
            if len(shapes) > 1:
                names.append(
                    f"shape at the {thing.position}" if form == "color" else f"thing at the {thing.position}"
                )
            if names:
                self.add("attribute", form, getattr(thing, form), space, a=self.pick(names))
        if shapes and self.rng.random() < 0.4:
            thing = self.pick(shapes)
            if names := self.names(thing):
                self.add("attribute", "size", thing.size, SIZES, a=self.pick(names))

    def count(self, form: str, n: int, **slots: str) -> None:
        """Asks for a count; counts of one are the commonest and are asked for less often."""
        if n > 1 or self.rng.random() < 0.4:
            self.add("counting", form, str(n), COUNTS, **slots)

    def counting(self) -> None:
        shapes = self.scene.shapes
        if shapes:
            self.count("count_shapes", len(shapes))
        if len(shapes) >= 2:
            color = self.commonest([t.color for t in shapes])
            self.count("count", sum(t.color == color for t in shapes), x=color)
            kind = self.commonest([t.shape for t in shapes])
            self.count("count_kind", sum(t.shape == kind for t in shapes), x=PLURALS[kind])
            size = self.pick(SIZES)
            if n := sum(t.size == size for t in shapes):
                self.count("count", n, x=size)
        if self.scene.bars and self.rng.random() < 0.4:
            self.add("counting", "count_bars", str(len(self.scene.bars)), COUNTS)

    def commonest(self, values: list[str]) -> str:
        """The commonest value, ties broken at random."""
        return max(self.shuffled(sorted(set(values))), key=values.count)

    def reading(self) -> None:
        for word in self.scene.of_kind("word"):
            self.add("reading", "read_word", word.word, WORDS)
        cards = self.scene.of_kind("digit")
        for card in cards:
            if sum(t.color == card.color for t in self.scene.of_kind("digit", "word")) == 1:
                self.add("reading", "read_digit", str(card.digit), DIGITS, x=card.color)

    # --- reasoning ---

    def spatial_relation(self) -> None:
        things = self.shuffled(self.scene.of_kind("shape", "digit"))
        made = 0
        for i, a in enumerate(things):
            for b in things[i + 1 :]:
                relation = _relation(a, b)
                if relation is None or made == 2:
                    continue
                names = self.names(a), self.names(b)
                if names[0] and names[1]:
                    self.add(
                        "spatial_relation", "relation", relation, RELATIONS,
                        a=self.pick(names[0]), b=self.pick(names[1]),
                    )  # fmt: skip
                    made += 1
        shapes = self.scene.shapes
        if len(shapes) >= 2:
            side = self.pick(SIDES)
            thing = _extreme(shapes, side)
            if thing is not None:
                form = self.pick(("color", "shape"))
                space = COLORS if form == "color" else SHAPES
                self.add("spatial_relation", f"extreme_{form}", getattr(thing, form), space, x=side)

    def comparison(self) -> None:
        shapes = self.scene.shapes
        if len(shapes) >= 2:
            for size, word in EXTENTS.items():
                only = [t for t in shapes if t.size == size]
                if len(only) == 1:
                    form = self.pick(("color", "shape"))
                    space = COLORS if form == "color" else SHAPES
                    self.add("comparison", f"extent_{form}", getattr(only[0], form), space, x=word)
        kinds = sorted({t.shape for t in shapes})
        if len(shapes) >= 3 and len(kinds) >= 2:
            a, b = self.shuffled(kinds)[:2]
            na, nb = sum(t.shape == a for t in shapes), sum(t.shape == b for t in shapes)
            answer = PLURALS[a] if na > nb else PLURALS[b] if nb > na else SAME
            if answer != SAME or self.rng.random() < 0.35:  # ties are the commonest case
                space = (PLURALS[a], PLURALS[b], SAME)
                self.add("comparison", "majority", answer, space, a=PLURALS[a], b=PLURALS[b])

    def arithmetic(self) -> None:
        cards = self.scene.of_kind("digit")
        if len(cards) != 2:
            return
        a, b = cards[0].digit, cards[1].digit
        self.add("arithmetic", "sum", str(a + b), SUMS)
        self.add("arithmetic", "difference", str(abs(a - b)), DIGITS)
        if a != b:
            self.add("arithmetic", "larger", str(max(a, b)), DIGITS[1:])

    def structured_reading(self) -> None:
        bars = self.scene.bars
        if not bars:
            return
        bar = self.pick(bars)
        self.add("structured_reading", "bar_value", str(bar.value), BAR_VALUES, x=bar.color)
        values = [b.value for b in bars]
        for word, value in zip(BAR_EXTENTS, (max(values), min(values)), strict=True):
            if values.count(value) == 1:
                shown = [b.color for b in bars]
                space = (
                    shown
                    if len(shown) >= OPTIONS
                    else [*shown, self.pick([c for c in COLORS if c not in shown])]
                )
                self.add("structured_reading", "bar_extreme", bars[values.index(value)].color, space, x=word)
        a, b = sorted(self.shuffled(bars)[:2], key=lambda t: -t.value)
        self.add(
            "structured_reading", "bar_difference", str(a.value - b.value), BAR_DIFFERENCES,
            a=a.color, b=b.color,
        )  # fmt: skip

    def bar_colors(self) -> list[str]:
        """The colors of the bars, filled up with others to the number of options."""
        shown = [b.color for b in self.scene.bars]
        others = self.shuffled([c for c in COLORS if c not in (*shown, "white")])
        return shown + others[: max(OPTIONS - len(shown), 0)]


def _relation(a: Thing, b: Thing) -> str | None:
    """Where `a` is from `b`, or None where two answers could be defended.

    Only things in one row or one column of the 3x3 grid are compared, so that a caption tells it too.
    """
    (ra, ca), (rb, cb) = a.cell, b.cell
    dx, dy = a.x - b.x, a.y - b.y
    if ra == rb and abs(dx) > 1.5 * abs(dy):
        return "left" if dx < 0 else "right"
    if ca == cb and abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _extreme(shapes: list[Thing], side: str) -> Thing | None:
    """The shape alone in the row or column of the grid nearest to `side`, or None."""
    axis = 1 if side in ("left", "right") else 0
    far = (min if side in ("left", "top") else max)(t.cell[axis] for t in shapes)
    there = [t for t in shapes if t.cell[axis] == far]
    return there[0] if len(there) == 1 else None


def make_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions worth asking about a scene, up to about four per ability, grouped by ability.

    Args:
        scene: the scene.
        rng: picks things, phrasings, wrong options and their order.

    Returns:
        Questions with exactly one right answer each.
    """
    maker = _Maker(scene, rng)
    for make in (
        maker.coarse, maker.localization, maker.attribute, maker.counting, maker.reading,
        maker.spatial_relation, maker.comparison, maker.arithmetic, maker.structured_reading,
    ):  # fmt: skip
        make()
    return maker.questions
