"""How hard the scenes of the mini world are: ranges from which each scene draws its own grade."""

import dataclasses

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """Ranges, each drawn from evenly.

    Attributes:
        style: how strongly a style shows, as a share of its full strength.
        damage: how strongly a quality other than "clear" shows, likewise.
        scene: how much of the background shows through a haze; 1 is no haze.
        small_shape: radius of a small shape, as a fraction of the image's side.
        small_card: half extent of a small digit card, likewise.
        clutter: number of specks on the background, which are nothing.
        shapes: how many shapes there are where they are the topic.
        digit_card: chance of a card with a digit where shapes are the topic.
        extra_card: chance of a card in a scene whose topic is another kind of card.
    """

    style: Range = (1.0, 1.0)
    damage: Range = (1.0, 1.0)
    scene: Range = (1.0, 1.0)
    small_shape: Range = (0.066, 0.082)
    small_card: Range = (0.115, 0.125)
    clutter: tuple[int, int] = (0, 0)
    shapes: tuple[int, int] = (2, 6)
    digit_card: float = 0.2
    extra_card: float = 0.0


FULL = Difficulty()
"""Every style and quality at its full strength, every background in plain view."""

GRADED = Difficulty(
    style=(0.05, 1.0),
    damage=(0.08, 1.0),
    scene=(0.1, 1.0),
    small_shape=(0.05, 0.082),
    small_card=(0.105, 0.125),
    clutter=(0, 10),
    extra_card=0.3,
)
"""From easy to hard in every respect; towers are trained on it."""

STANDARD = dataclasses.replace(
    GRADED,
    style=(0.05, 0.8),
    damage=(0.2, 1.3),
    scene=(0.05, 0.8),
    shapes=(2, 5),
    digit_card=0.6,
    extra_card=1.0,
)
"""What training data, benchmark and probes are drawn with, but for the LLM's pretraining (`FULL`)."""

DIFFICULTIES = {"standard": STANDARD, "full": FULL, "graded": GRADED}
