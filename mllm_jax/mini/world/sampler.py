"""Draws scenes of the mini world, deterministically from `(seed, index, split)`."""

import math
from functools import lru_cache

import numpy as np

from mllm_jax.mini.world.difficulty import FULL, STANDARD, Difficulty
from mllm_jax.mini.world.digits import digits
from mllm_jax.mini.world.scene import (
    COLORS,
    LIGHTING,
    MAX_BAR,
    PANEL_PAD,
    QUALITY,
    RGB,
    SCENES,
    SHAPES,
    SIZES,
    SPLITS,
    STYLES,
    WORDS,
    Scene,
    Thing,
    bar_unit,
)

_CELL_MARGIN = 0.03  # how far a center stays from the borders of the 3x3 grid, so that its place is plain
_GAP = 0.02  # least free space between two things


@lru_cache(maxsize=1)
def _digit_pools() -> dict[bool, list[np.ndarray]]:
    """Example numbers per digit class: `True` for the benchmark (one in five), `False` for all training."""
    labels = digits()[1]
    pools: dict[bool, list[np.ndarray]] = {True: [], False: []}
    rng = np.random.default_rng(20240)
    for digit in range(10):
        which = rng.permutation(np.flatnonzero(labels == digit))
        cut = len(which) // 5
        pools[True].append(which[:cut])
        pools[False].append(which[cut:])
    return pools


def digit_pool(split: str, digit: int) -> np.ndarray:
    """Numbers of the handwritten examples of `digit` that `split` may show (those of "mini" are its own)."""
    return _digit_pools()[split == "mini"][digit]


class _Sampler:
    """Draws one scene; holds the random stream and what has been placed so far."""

    def __init__(self, rng: np.random.Generator, split: str, difficulty: Difficulty):
        self.rng = rng
        self.split = split
        self.difficulty = difficulty
        self.boxes: list[tuple[float, float, float, float]] = []
        self.cells = [(r, c) for r in range(3) for c in range(3)]

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def between(self, low: float, high: float) -> float:
        return float(low + (high - low) * self.rng.random())

    def place(self, w: float, h: float) -> tuple[float, float] | None:
        """A free center for a box of half extents (w, h) in a grid cell of its own, or None."""
        for _ in range(40):
            if not self.cells:
                return None
            row, col = self.pick(self.cells)
            x0, x1 = max(col / 3 + _CELL_MARGIN, w + 0.015), min((col + 1) / 3 - _CELL_MARGIN, 0.985 - w)
            y0, y1 = max(row / 3 + _CELL_MARGIN, h + 0.015), min((row + 1) / 3 - _CELL_MARGIN, 0.985 - h)
            if x0 > x1 or y0 > y1:
                continue
            x, y = self.between(x0, x1), self.between(y0, y1)
            if all(
                abs(x - bx) > w + bw + _GAP or abs(y - by) > h + bh + _GAP for bx, by, bw, bh in self.boxes
            ):
                self.cells.remove((row, col))
                self.boxes.append((x, y, w, h))
                return round(x, 4), round(y, 4)
        return None

    def lighting(self, background: str) -> str:
        """The time of day; a plain background and space have only one."""
        return {"plain": "day", "space": "night"}.get(background) or self.pick(LIGHTING)

    def rgb(self, color: str) -> tuple[int, int, int]:
        jitter = self.rng.integers(-10, 11, size=3)
        if color in ("black", "white", "gray"):
            jitter = np.repeat(jitter[:1], 3)
        return tuple(int(v) for v in np.clip(np.array(RGB[color]) + jitter, 0, 255))

    def shape(self, shape: str, color: str, size: str, radius: float | None = None) -> Thing | None:
        """A shape at a free place, or None where there is no room."""
        if radius is None:
            radius = self.between(*(self.difficulty.small_shape if size == "small" else (0.125, 0.15)))
        w = h = radius
        if shape == "rectangle":
            w, h = radius * 1.1, radius * self.between(0.5, 0.62)
            if self.rng.random() < 0.5:
                w, h = h, w
        elif shape == "square":
            w = h = radius * 0.88
        lean = 8.0 if shape in ("square", "rectangle", "diamond", "cross") else 15.0
        angle = self.between(-lean, lean) if self.rng.random() < 0.5 else 0.0
        grow = 1.0 + abs(math.sin(math.radians(angle)))  # room for the rotated box
        where = self.place(max(w, h * 0.3) * grow, max(h, w * 0.3) * grow)
        if where is None:
            return None
        return Thing(
            "shape", color, size, *where, round(w, 4), round(h, 4), self.rgb(color), shape, round(angle, 2)
        )

    def digit_card(self, digit: int, color: str) -> Thing | None:
        """A card with a handwritten digit at a free place, or None."""
        size = self.pick(SIZES)
        w = self.between(*(self.difficulty.small_card if size == "small" else (0.15, 0.165)))
        where = self.place(w, w)
        if where is None:
            return None
        index = int(self.pick(digit_pool(self.split, digit)))
        return Thing(
            "digit", color, size, *where, round(w, 4), round(w, 4), self.rgb(color),
            digit=digit, digit_index=index,
        )  # fmt: skip

    def word_card(self, word: str, color: str) -> Thing | None:
        """A card with a word at a free place, or None."""
        w, h = 0.055 * len(word) + self.between(0.03, 0.045), self.between(0.1, 0.115)
        where = self.place(w, h)
        if where is None:
            return None
        return Thing("word", color, "large", *where, round(w, 4), round(h, 4), self.rgb(color), word=word)

    def chart(self) -> tuple[tuple[float, float, float, float], list[Thing]]:
        """A panel and its 3 or 4 bars, from left to right."""
        n = int(self.rng.integers(3, 5))
        w, h = self.between(0.28, 0.34), self.between(0.26, 0.31)
        x, y = self.between(w + 0.02, 0.98 - w), self.between(h + 0.02, 0.98 - h)
        self.boxes.append((x, y, w, h))
        palette = [c for c in COLORS if c != "white"]  # a white bar is lost on the panel
        colors = [palette[int(i)] for i in self.rng.permutation(len(palette))[:n]]
        values = [int(v) for v in self.rng.integers(1, MAX_BAR + 1, size=n)]
        unit = bar_unit(h)
        base = y + h - PANEL_PAD
        step = (2 * w - 2 * PANEL_PAD) / n
        bars = []
        for i, (color, value) in enumerate(zip(colors, values, strict=True)):
            bx = x - w + PANEL_PAD + (i + 0.5) * step
            half = unit * value / 2
            where = round(bx, 4), round(base - half, 4), round(step * 0.33, 4), round(half, 4)
            bars.append(Thing("bar", color, "", *where, self.rgb(color), value=value))
        return (round(x, 4), round(y, 4), round(w, 4), round(h, 4)), bars

    def shape_specs(self, n: int) -> list[tuple[str, str, str]]:
        """(shape, color, size) of `n` shapes: now and then repeated, now and then one of another size."""
        specs = [(self.pick(SHAPES), self.pick(COLORS), self.pick(SIZES)) for _ in range(n)]
        mode = self.rng.random()
        k = int(self.rng.integers(1, n + 1))
        if mode < 0.35:
            shape = self.pick(SHAPES)
            specs = [(shape if i < k else s, c, z) for i, (s, c, z) in enumerate(specs)]
        elif mode < 0.6:
            color = self.pick(COLORS)
            specs = [(s, color if i < k else c, z) for i, (s, c, z) in enumerate(specs)]
        if n >= 2 and self.rng.random() < 0.4:
            odd = int(self.rng.integers(n))
            one, others = SIZES if self.rng.random() < 0.5 or n > 4 else SIZES[::-1]
            if n > 4:  # many large shapes have no room
                one, others = "large", "small"
            specs = [(s, c, one if i == odd else others) for i, (s, c, _) in enumerate(specs)]
        return sorted(specs, key=lambda spec: spec[2])  # the large ones are placed first


def _in_raster_order(things: list[Thing | None]) -> list[Thing]:
    """The things that found a place, row by row."""
    return sorted((thing for thing in things if thing is not None), key=lambda thing: (thing.cell, thing.x))


def _backdrop(sampler: _Sampler, colors: list[str]) -> tuple[int, int, int]:
    """A plain background away from the colors of the things."""
    for _ in range(20):
        if sampler.rng.random() < 0.5:
            rgb = sampler.rng.integers(190, 256, size=3)
        else:
            rgb = sampler.rng.integers(0, 256, size=3)
        if all(np.abs(rgb - np.array(RGB[c])).sum() > 130 for c in colors):
            break
    return tuple(int(v) for v in rgb)


def sample_scene(seed: int, index: int, split: str, difficulty: Difficulty | None = None) -> Scene:
    """The scene number `index` of a split.

    Args:
        seed: which world; any non-negative integer.
        index: number of the scene, non-negative.
        split: one of `SPLITS`; different splits use disjoint random streams and "mini" (the benchmark) its
            own handwritten digits.
        difficulty: the ranges of what makes a scene easy or hard; None for `FULL` in the split "foundation" and
            `STANDARD` in the others.

    Returns:
        The same scene for the same arguments, on any machine.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    if difficulty is None:
        difficulty = FULL if split == "foundation" else STANDARD
    rng = np.random.default_rng(np.random.SeedSequence([0x313D, SPLITS.index(split), seed, index]))
    s = _Sampler(rng, split, difficulty)
    graded = np.random.default_rng(np.random.SeedSequence([0x64AD, SPLITS.index(split), seed, index]))
    simple = rng.random() < 0.15
    panel, bars, things = None, [], []
    if simple:
        topic, background = "shapes", "plain"
        size = s.pick(SIZES)
        radius = s.between(0.066, 0.09) if size == "small" else s.between(0.125, 0.26)
        things.append(s.shape(s.pick(SHAPES), s.pick(COLORS), size, radius))
    else:
        draw = rng.random()
        topic = "shapes" if draw < 0.34 else "numbers" if draw < 0.6 else "words" if draw < 0.78 else "chart"
        background = "plain" if rng.random() < 0.1 else s.pick(SCENES[:-1])
        specs: list[tuple[str, str, str]] = []
        if topic == "shapes":
            fewest, most = difficulty.shapes
            specs = s.shape_specs(int(rng.integers(fewest, most + 1)))
            if rng.random() < difficulty.digit_card:
                things.append(s.digit_card(int(rng.integers(10)), s.pick(COLORS)))
        elif topic == "numbers":
            a, b = int(rng.integers(10)), int(rng.integers(10))
            colors = rng.permutation(len(COLORS))[:2]
            things += [s.digit_card(a, COLORS[int(colors[0])]), s.digit_card(b, COLORS[int(colors[1])])]
            if difficulty.extra_card and graded.random() < difficulty.extra_card:
                things.append(s.word_card(s.pick(WORDS), s.pick(COLORS)))
            n = int(rng.integers(0, 3))
            specs = s.shape_specs(n) if n else []
        elif topic == "words":
            things.append(s.word_card(s.pick(WORDS), s.pick(COLORS)))
            if difficulty.extra_card and graded.random() < difficulty.extra_card:
                things.append(s.digit_card(int(rng.integers(10)), s.pick(COLORS)))
            n = int(rng.integers(0, 4))
            specs = s.shape_specs(n) if n else []
        else:
            panel, bars = s.chart()
            if rng.random() < 0.4:
                specs = [(s.pick(SHAPES), s.pick(COLORS), "small")]
        things += [s.shape(*spec) for spec in specs]
    found = _in_raster_order(things)
    lighting = s.lighting(background)
    style, quality = s.pick(STYLES), s.pick(QUALITY)
    if simple and rng.random() < 0.5:
        style, quality = "flat", "clear"
    return Scene(
        split=split,
        seed=seed,
        index=index,
        topic=topic,
        background=background,
        lighting=lighting,
        style=style,
        quality=quality,
        backdrop=_backdrop(s, [t.color for t in found]),
        outline=not (simple and rng.random() < 0.5),
        things=(*found, *bars),
        panel=panel,
        texture=int(rng.integers(2**31)),
        **_grade(graded, difficulty),
    )


def _grade(rng: np.random.Generator, difficulty: Difficulty) -> dict[str, float | int]:
    """The fields of a scene that say how hard it is."""
    low, high = difficulty.clutter
    ranges = {"style_strength": difficulty.style, "damage": difficulty.damage, "view": difficulty.scene}
    grade = {name: round(float(rng.uniform(*span)), 3) for name, span in ranges.items()}
    return {**grade, "clutter": int(rng.integers(low, high + 1))}


DENSE_MOST = 8  # things of a dense scene; more would be beyond the counts that towers learn
CARDS = (0.45, 0.15)


def dense_scene(
    seed: int, index: int, difficulty: Difficulty = FULL, cards: tuple[float, float] = CARDS
) -> Scene:
    """A crowded scene of the split "foundation", in which every ninth of the image that has room holds a thing.

    Most are cards, so that a tower sees many digits and words in an image. There may be more cards than a question can
    tell apart: such scenes are for targets per patch.

    Args:
        seed: which world.
        index: number of the scene.
        difficulty: the ranges of what makes a scene easy or hard.
        cards: shares of the things that are cards with a digit, and with a word; the others are shapes.
    """
    rng = np.random.default_rng(np.random.SeedSequence([0xDE25E, seed, index]))
    s = _Sampler(rng, "foundation", difficulty)
    things: list[Thing | None] = []
    for _ in range(DENSE_MOST):
        draw = rng.random()
        if draw < cards[0]:
            things.append(s.digit_card(int(rng.integers(10)), s.pick(COLORS)))
        elif draw < sum(cards):
            things.append(s.word_card(s.pick(WORDS), s.pick(COLORS)))
        else:
            things.append(s.shape(s.pick(SHAPES), s.pick(COLORS), s.pick(SIZES)))
    found = _in_raster_order(things)
    kinds = [t.kind for t in found]
    topic = "numbers" if kinds.count("digit") > 1 else "words" if "word" in kinds else "shapes"
    background = s.pick(SCENES)
    return Scene(
        split="foundation",
        seed=seed,
        index=index,
        topic=topic,
        background=background,
        lighting=s.lighting(background),
        style=s.pick(STYLES),
        quality=s.pick(QUALITY),
        backdrop=_backdrop(s, [t.color for t in found]),
        outline=True,
        things=tuple(found),
        panel=None,
        texture=int(rng.integers(2**31)),
        **_grade(rng, difficulty),
    )
