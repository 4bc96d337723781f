"""The empty scenes of the mini world: beach, forest, city, desert, snow, space and plain."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from mllm_jax.mini.world.scene import Scene

Number = int | float
Color = tuple[int, int, int]

# Colours are muted, so that the saturated, outlined things stand out.
_SKY = {
    "day": ((120, 180, 235), (200, 226, 245)),
    "sunset": ((120, 70, 140), (255, 150, 70)),
    "night": ((8, 10, 38), (30, 36, 84)),
}
_GROUND_TINT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.68, 0.5), "night": (0.3, 0.34, 0.52)}


def _gradient(stops: list[tuple[Number, Color]], n: int) -> Image.Image:
    """A vertical gradient through (height fraction, colour) stops, n x n."""
    at = np.linspace(0, 1, n)
    rows = np.stack([np.interp(at, [s for s, _ in stops], [c[k] for _, c in stops]) for k in range(3)], -1)
    return Image.fromarray(rows.astype(np.uint8)[:, None, :]).resize((n, n))


class _Canvas:
    """A sky and what the painters of the single scenes need.

    Attributes:
        n: side in pixels.
        y0: height of the horizon in pixels.
        night: whether windows glow.
    """

    def __init__(self, scene: Scene, n: int, rng: np.random.Generator):
        top, low = _SKY[scene.lighting]
        horizon = float(rng.uniform(0.38, 0.52))
        self.n, self.rng, self.y0 = n, rng, horizon * n
        self.night = scene.lighting == "night"
        self.tint = _GROUND_TINT[scene.lighting]
        self.image = _gradient([(0, top), (horizon, low), (1, low)], n)
        self.draw = ImageDraw.Draw(self.image)
        if self.night:
            for x, y in rng.random((25, 2)):
                for dx in (0, 1):
                    self.draw.point((x * n + dx, y * self.y0), fill=(200, 205, 230))

    def lit(self, r: Number, g: Number, b: Number) -> Color:
        """A colour of the ground as the light of the day shows it."""
        return int(r * self.tint[0]), int(g * self.tint[1]), int(b * self.tint[2])

    def rectangle(self, x0: Number, y0: Number, x1: Number, y1: Number, fill: Color) -> None:
        self.draw.rectangle((x0, y0, x1, y1), fill=fill)

    def wave(self, base: Number, height: Number, freq: Number, fill: Color) -> None:
        """Everything below a wavy line."""
        n, phase = self.n, self.rng.uniform(0, 6.28)
        xs = np.linspace(0, n, 25)
        ys = base + height * np.sin(xs / n * freq + phase)
        self.draw.polygon([(0, n), *zip(xs.tolist(), ys.tolist(), strict=True), (n, n)], fill=fill)


def _beach(c: _Canvas) -> None:
    n, y0 = c.n, c.y0
    c.rectangle(0, y0, n, n, c.lit(70, 140, 190))
    for k in range(4):
        y = y0 + (k + 0.7) * n * 0.05
        c.draw.line((0, y, n, y), fill=c.lit(120, 180, 215), width=2)
    shore = y0 + n * c.rng.uniform(0.2, 0.27)
    c.wave(shore - 6, 5, 9, c.lit(225, 240, 245))
    c.wave(shore, 5, 9, c.lit(232, 214, 168))


def _forest(c: _Canvas) -> None:
    n, y0, rng = c.n, c.y0, c.rng
    c.rectangle(0, y0, n, n, c.lit(96, 140, 84))
    for x in np.arange(-0.05, 1.1, 0.13):
        cx, tall = (x + rng.uniform(-0.03, 0.03)) * n, rng.uniform(0.28, 0.42) * n
        foot = y0 + rng.uniform(0.02, 0.1) * n
        c.rectangle(cx - 4, foot - 10, cx + 4, foot + 14, c.lit(96, 76, 58))
        for k in range(3):
            half, base = n * (0.09 - 0.018 * k), foot - tall * 0.28 * k
            c.draw.polygon(
                [(cx - half, base), (cx + half, base), (cx, base - tall * 0.42)],
                fill=c.lit(44 + 10 * k, 92 + 10 * k, 58 + 6 * k),
            )


def _city(c: _Canvas) -> None:
    n, y0, rng = c.n, c.y0, c.rng
    c.rectangle(0, y0, n, n, c.lit(150, 150, 156))
    left = -4.0
    window = (236, 214, 130) if c.night else c.lit(196, 210, 222)
    while left < n:
        wide, up = rng.uniform(0.1, 0.17) * n, rng.uniform(0.12, 0.36) * n
        g = rng.uniform(96, 140)
        c.rectangle(left, y0 - up, left + wide, y0 + 12, c.lit(g, g + 4, g + 14))
        for wy in np.arange(y0 - up + 6, y0 + 2, 12):
            for wx in np.arange(left + 5, left + wide - 6, 10):
                c.rectangle(wx, wy, wx + 4, wy + 5, window)
        left += wide + 2
    road = (y0 + n) / 2 + 10
    c.rectangle(0, road - 26, n, road + 26, c.lit(104, 104, 110))
    for x in np.arange(-10.0, n, 36):
        c.rectangle(x, road - 2, x + 18, road + 2, c.lit(228, 228, 220))


def _desert(c: _Canvas) -> None:
    n, y0, rng = c.n, c.y0, c.rng
    c.wave(y0, 9, 7, c.lit(222, 186, 120))
    c.wave(y0 + n * 0.17, 11, 8, c.lit(234, 202, 138))
    c.wave(y0 + n * 0.36, 11, 6, c.lit(242, 214, 152))
    green = c.lit(96, 128, 84)
    for _ in range(3):
        cx, foot, tall = rng.uniform(0, n), y0 + rng.uniform(0.05, 0.25) * n, n * rng.uniform(0.13, 0.2)
        c.draw.line((cx, foot, cx, foot - tall), fill=green, width=9)  # a cactus and its two arms
        c.draw.line((cx - 14, foot - tall * 0.8, cx - 14, foot - tall * 0.45), fill=green, width=6)
        c.draw.line((cx - 14, foot - tall * 0.45, cx + 14, foot - tall * 0.45), fill=green, width=6)
        c.draw.line((cx + 14, foot - tall * 0.45, cx + 14, foot - tall * 0.9), fill=green, width=6)


def _snow(c: _Canvas) -> None:
    n, y0, rng = c.n, c.y0, c.rng
    peaks = [(n * (k + 0.5) / 5, y0 - n * rng.uniform(0.08, 0.25) * (k % 2)) for k in range(5)]
    c.draw.polygon([(0, y0), *peaks, (n, y0), (n, n), (0, n)], fill=c.lit(196, 208, 224))
    c.wave(y0 + 6, 6, 6, c.lit(236, 242, 250))
    c.wave(y0 + n * 0.25, 8, 5, c.lit(248, 250, 254))
    for x, y, r in rng.random((45, 3)):
        r = 1.5 + 1.8 * r
        flake = c.lit(255, 255, 255) if y * n < y0 else c.lit(206, 216, 232)
        c.draw.ellipse((x * n - r, y * n - r, x * n + r, y * n + r), fill=flake)


def _space(n: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient([(0, (6, 5, 20)), (0.5, (26, 14, 52)), (1, (8, 6, 24))], n)
    draw = ImageDraw.Draw(image)
    for x, y, r in rng.random((60, 3)):
        r, v = 0.6 + 1.5 * r, int(150 + 100 * r)
        draw.ellipse((x * n - r, y * n - r, x * n + r, y * n + r), fill=(v, v, 235))
    x, y, r = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(0.1, 0.16) * n
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(88, 66, 120))
    draw.ellipse((x - r * 1.7, y - r * 0.3, x + r * 1.7, y + r * 0.3), outline=(120, 104, 150), width=4)
    return image


_PAINTERS: dict[str, Callable[[_Canvas], None]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "snow": _snow,
}


def empty_scene(scene: Scene, n: int, rng: np.random.Generator) -> Image.Image:
    """The background of a scene in its light, without its things.

    Args:
        scene: the scene.
        n: side in pixels.
        rng: draws the details.
    """
    if scene.background == "plain":
        return Image.new("RGB", (n, n), scene.backdrop)
    if scene.background == "space":
        return _space(n, rng)
    canvas = _Canvas(scene, n, rng)
    _PAINTERS[scene.background](canvas)
    return canvas.image
