"""Scenes of the mini world: pure, JSON-able descriptions of procedural images.

Coordinates are fractions of the image's side, x to the right and y down; `w` and `h` of a thing are half extents.
`sampler.py` draws scenes.
"""

import dataclasses
from typing import Any

SHAPES = ("circle", "square", "triangle", "rectangle", "star", "diamond", "cross", "heart")
COLORS = (
    "red", "green", "blue", "yellow", "orange", "purple",
    "pink", "teal", "brown", "black", "white", "gray",
)  # fmt: skip
SCENES = ("beach", "forest", "city", "desert", "snow", "space", "plain")
LIGHTING = ("day", "sunset", "night")
STYLES = ("flat", "sketch", "mosaic", "painting")
QUALITY = ("clear", "blurry", "noisy", "faded")
TOPICS = ("shapes", "numbers", "words", "chart")
SIZES = ("small", "large")
WORDS = (
    "cat", "dog", "sun", "moon", "fish", "bird", "tree", "book",
    "cup", "hat", "key", "milk", "ship", "rain", "leaf", "door",
)  # fmt: skip
POSITIONS = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
SPLITS = ("foundation", "pretrain", "finetune", "mini")
MAX_BAR = 5
PANEL_PAD = 0.03

RGB = {
    "red": (222, 40, 40),
    "green": (40, 165, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 222, 40),
    "orange": (250, 140, 20),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "teal": (10, 165, 165),
    "brown": (128, 74, 30),
    "black": (18, 18, 18),
    "white": (248, 248, 248),
    "gray": (130, 130, 130),
}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing in an image.

    Attributes:
        kind: "shape", "digit" (a card with a handwritten digit), "word" (a card with a word) or "bar".
        color: one of `COLORS`; the fill of the shape, card or bar.
        size: one of `SIZES`; "" for bars.
        x, y: center, as a fraction of the image's side.
        w, h: half extents, as a fraction of the image's side.
        rgb: the exact fill (the color's RGB with a little jitter).
        shape: one of `SHAPES` for shapes, else "".
        angle: rotation in degrees (shapes only).
        digit: 0..9 for digit cards, else -1.
        digit_index: which handwritten example of scikit-learn's set, else -1.
        word: one of `WORDS` for word cards, else "".
        value: height 1..5 for bars, else 0.
    """

    kind: str
    color: str
    size: str
    x: float
    y: float
    w: float
    h: float
    rgb: tuple[int, int, int]
    shape: str = ""
    angle: float = 0.0
    digit: int = -1
    digit_index: int = -1
    word: str = ""
    value: int = 0

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of the 3x3 grid that holds the center."""
        return min(int(self.y * 3), 2), min(int(self.x * 3), 2)

    @property
    def position(self) -> str:
        """The place in words, one of `POSITIONS`."""
        row, col = self.cell
        return POSITIONS[row * 3 + col]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The description of one image.

    Attributes:
        split, seed, index: where the scene came from.
        topic, background, lighting, style, quality: one of `TOPICS`, `SCENES`, `LIGHTING`, `STYLES` and
            `QUALITY`.
        backdrop: RGB of a plain background (unused for the others).
        outline: whether shapes have a thin contrasting outline.
        things: everything shown, in raster order (bars of a chart from left to right, after the rest).
        panel: (x, y, w, h) of the chart's panel, center and half extents, or None.
        texture: seed of everything that is only looks (background details, noise, strokes).
        style_strength, damage: how strongly style and quality show, as shares of their full strength.
        view: how much of the background shows through a haze; 1 is no haze.
        clutter: number of specks on the background, which are nothing.
    """

    split: str
    seed: int
    index: int
    topic: str
    background: str
    lighting: str
    style: str
    quality: str
    backdrop: tuple[int, int, int]
    outline: bool
    things: tuple[Thing, ...]
    panel: tuple[float, float, float, float] | None
    texture: int
    style_strength: float = 1.0
    damage: float = 1.0
    view: float = 1.0
    clutter: int = 0

    def of_kind(self, *kinds: str) -> list[Thing]:
        """The things of the given kinds, in order."""
        return [t for t in self.things if t.kind in kinds]

    @property
    def shapes(self) -> list[Thing]:
        return self.of_kind("shape")

    @property
    def bars(self) -> list[Thing]:
        return self.of_kind("bar")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict without what is at its default; `scene_from_json` is its inverse."""
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return {name: value for name, value in dataclasses.asdict(self).items() if name in given}


def scene_from_json(data: dict[str, Any]) -> Scene:
    """The scene that `Scene.to_json` described (lists, as JSON gives them, become tuples)."""
    things = tuple(Thing(**{**t, "rgb": tuple(t["rgb"])}) for t in data["things"])
    panel = None if data["panel"] is None else tuple(data["panel"])
    return Scene(**{**data, "things": things, "panel": panel, "backdrop": tuple(data["backdrop"])})


def bar_unit(panel_h: float) -> float:
    """Height of one unit of a chart whose panel has half extent `panel_h`."""
    return (2 * panel_h - 2 * PANEL_PAD) / MAX_BAR
