"""Drawing of mini-world scenes: 112 pixels a side, antialiased, about 3 ms a picture."""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mllm_jax.data.mini_world.scene import MAX_BAR, PANEL_PAD, Scene, Thing, bar_unit

SIDE = 112
LOOK_VERSION = 1  # to be raised with any change of the looks; data sets record it
_SS = 3  # supersampling of the things
_BG = 2  # supersampling of the background

Points = list[tuple[float, float]]


@lru_cache(maxsize=1)
def _unit_polygons() -> dict[str, Points]:
    """The silhouettes in the box [-1, 1] x [-1, 1], y down."""
    turn = [2 * math.pi * i / 40 for i in range(40)]
    star = [
        (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
        for i, r in enumerate([1.08, 0.45] * 5)
    ]
    heart = [
        (
            math.sin(t) ** 3 * 1.05,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15.5 - 0.12,
        )
        for t in turn
    ]
    a = 0.36
    cross = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a)]
    return {
        "circle": [(math.cos(t), math.sin(t)) for t in turn],
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "rectangle": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
        "star": [(x, y + 0.06) for x, y in star],
        "diamond": [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)],
        "cross": [*cross, (-a, -a)],
        "heart": heart,
    }


def silhouette(thing: Thing) -> Points:
    """The polygon a thing covers, in fractions of the picture's side."""
    base = _unit_polygons()[thing.shape or "square"]
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    return [
        (
            thing.x + u * thing.w * cos - v * thing.h * sin,
            thing.y + u * thing.w * sin + v * thing.h * cos,
        )
        for u, v in base
    ]


# --- backgrounds ------------------------------------------------------------------------------------------


def _gradient(stops: list[tuple[float, tuple[int, int, int]]], n: int) -> Image.Image:
    """A vertical gradient through (height fraction, colour) stops, n x n."""
    at = np.linspace(0, 1, n)
    rows = np.stack([np.interp(at, [s for s, _ in stops], [c[k] for _, c in stops]) for k in range(3)], -1)
    return Image.fromarray(rows.astype(np.uint8)[:, None, :]).resize((n, n))


_SKY = {
    "day": ((120, 180, 235), (200, 226, 245)),
    "sunset": ((120, 70, 140), (255, 150, 70)),
    "night": ((8, 10, 38), (30, 36, 84)),
}
_GROUND_TINT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.68, 0.5), "night": (0.3, 0.34, 0.52)}
_THING_TINT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.93, 0.84), "night": (0.82, 0.84, 0.94)}


def _background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The empty scene at SIDE * _BG, lit."""
    n = SIDE * _BG
    if scene.background == "plain":
        return Image.new("RGB", (n, n), scene.backdrop)
    top, low = _SKY[scene.lighting]
    horizon = float(rng.uniform(0.38, 0.52))
    tint = _GROUND_TINT[scene.lighting]

    def lit(r: float, g: float, b: float) -> tuple[int, int, int]:
        return int(r * tint[0]), int(g * tint[1]), int(b * tint[2])

    if scene.background == "space":
        image = _gradient([(0, (6, 5, 20)), (0.5, (26, 14, 52)), (1, (8, 6, 24))], n)
        draw = ImageDraw.Draw(image)
        for x, y, r in rng.random((60, 3)):
            r, v = 0.6 + 1.5 * r, int(150 + 100 * r)
            draw.ellipse((x * n - r, y * n - r, x * n + r, y * n + r), fill=(v, v, 235))
        x, y, r = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(0.1, 0.16) * n
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(88, 66, 120))
        draw.ellipse((x - r * 1.7, y - r * 0.3, x + r * 1.7, y + r * 0.3), outline=(120, 104, 150), width=4)
        return image
    image = _gradient([(0, top), (horizon, low), (1, low)], n)
    draw = ImageDraw.Draw(image)
    y0 = horizon * n
    if scene.lighting == "night":
        for x, y in rng.random((25, 2)):
            draw.point((x * n, y * y0), fill=(200, 205, 230))
            draw.point((x * n + 1, y * y0), fill=(200, 205, 230))

    def wave(base: float, height: float, freq: float) -> Points:
        phase = rng.uniform(0, 6.28)
        xs = np.linspace(0, n, 25)
        ys = base + height * np.sin(xs / n * freq + phase)
        return [(0.0, float(n)), *zip(xs.tolist(), ys.tolist(), strict=True), (float(n), float(n))]

    if scene.background == "beach":
        draw.rectangle((0, y0, n, n), fill=lit(70, 140, 190))
        for k in range(4):
            y = y0 + (k + 0.7) * n * 0.05
            draw.line((0, y, n, y), fill=lit(120, 180, 215), width=2)
        shore = y0 + n * rng.uniform(0.2, 0.27)
        draw.polygon(wave(shore - 6, 5, 9), fill=lit(225, 240, 245))
        draw.polygon(wave(shore, 5, 9), fill=lit(232, 214, 168))
    elif scene.background == "forest":
        draw.rectangle((0, y0, n, n), fill=lit(96, 140, 84))
        for x in np.arange(-0.05, 1.1, 0.13):
            cx, tall = (x + rng.uniform(-0.03, 0.03)) * n, rng.uniform(0.28, 0.42) * n
            foot = y0 + rng.uniform(0.02, 0.1) * n
            draw.rectangle((cx - 4, foot - 10, cx + 4, foot + 14), fill=lit(96, 76, 58))
            for k in range(3):
                half, base = n * (0.09 - 0.018 * k), foot - tall * 0.28 * k
                draw.polygon(
                    [(cx - half, base), (cx + half, base), (cx, base - tall * 0.42)],
                    fill=lit(44 + 10 * k, 92 + 10 * k, 58 + 6 * k),
                )
    elif scene.background == "city":
        draw.rectangle((0, y0, n, n), fill=lit(150, 150, 156))
        left = -4.0
        glow = (236, 214, 130) if scene.lighting == "night" else lit(196, 210, 222)
        while left < n:
            wide, up = rng.uniform(0.1, 0.17) * n, rng.uniform(0.12, 0.36) * n
            g = rng.uniform(96, 140)
            draw.rectangle((left, y0 - up, left + wide, y0 + 12), fill=lit(g, g + 4, g + 14))
            for wy in np.arange(y0 - up + 6, y0 + 2, 12):
                for wx in np.arange(left + 5, left + wide - 6, 10):
                    draw.rectangle((wx, wy, wx + 4, wy + 5), fill=glow)
            left += wide + 2
        mid = (y0 + n) / 2 + 10
        draw.rectangle((0, mid - 26, n, mid + 26), fill=lit(104, 104, 110))
        for x in np.arange(-10, n, 36):
            draw.rectangle((x, mid - 2, x + 18, mid + 2), fill=lit(228, 228, 220))
    elif scene.background == "desert":
        draw.polygon(wave(y0, 9, 7), fill=lit(222, 186, 120))
        draw.polygon(wave(y0 + n * 0.17, 11, 8), fill=lit(234, 202, 138))
        draw.polygon(wave(y0 + n * 0.36, 11, 6), fill=lit(242, 214, 152))
        for _ in range(3):
            cx, foot, tall = rng.uniform(0, n), y0 + rng.uniform(0.05, 0.25) * n, n * rng.uniform(0.13, 0.2)
            green = lit(96, 128, 84)
            draw.line((cx, foot, cx, foot - tall), fill=green, width=9)
            draw.line((cx - 14, foot - tall * 0.8, cx - 14, foot - tall * 0.45), fill=green, width=6)
            draw.line((cx - 14, foot - tall * 0.45, cx + 14, foot - tall * 0.45), fill=green, width=6)
            draw.line((cx + 14, foot - tall * 0.45, cx + 14, foot - tall * 0.9), fill=green, width=6)
    else:  # snow
        draw.polygon(
            [(0, y0), *[(n * (k + 0.5) / 5, y0 - n * rng.uniform(0.08, 0.25) * (k % 2)) for k in range(5)],
             (n, y0), (n, n), (0, n)],
            fill=lit(196, 208, 224),
        )  # fmt: skip
        draw.polygon(wave(y0 + 6, 6, 6), fill=lit(236, 242, 250))
        draw.polygon(wave(y0 + n * 0.25, 8, 5), fill=lit(248, 250, 254))
        for x, y, r in rng.random((45, 3)):
            r = 1.5 + 1.8 * r
            flake = lit(255, 255, 255) if y * n < y0 else lit(206, 216, 232)
            draw.ellipse((x * n - r, y * n - r, x * n + r, y * n + r), fill=flake)
    return image


# --- things -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=1)
def _digit_images() -> np.ndarray:
    from sklearn.datasets import load_digits

    return (load_digits().images * (255 / 16)).astype(np.uint8)


@lru_cache(maxsize=64)
def _word_mask(word: str, width: int, height: int) -> Image.Image:
    """The word in capitals as a coverage mask filling the given box as far as its proportions allow."""
    text = word.upper()
    left, top, right, bottom = _font(60).getbbox(text)
    size = max(int(60 * min(width / (right - left), height / (bottom - top))), 6)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text(
        (width / 2, height / 2), text, fill=255, font=_font(size), anchor="mm",
        stroke_width=max(size // 30, 1), stroke_fill=255,
    )  # fmt: skip
    return mask


def _dark(rgb: tuple[int, int, int]) -> bool:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 118


def _draw_thing(layer: Image.Image, draw: ImageDraw.ImageDraw, thing: Thing, outline: bool) -> None:
    n = SIDE * _SS
    edge = (245, 245, 245, 255) if _dark(thing.rgb) else (25, 25, 25, 255)
    points = [(x * n, y * n) for x, y in silhouette(thing)]
    draw.polygon(points, fill=(*thing.rgb, 255))
    if outline:
        width = 2 if thing.kind == "bar" else 3
        draw.line([*points, points[0], points[1]], fill=edge, width=width, joint="curve")
    if thing.kind == "digit":
        side = round(thing.w * 2 * n * 0.86)
        mask = Image.fromarray(_digit_images()[thing.digit_index]).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        mask = mask.point([min(max((v - 50) * 2, 0), 255) for v in range(256)])
        layer.paste(edge, (round(thing.x * n - side / 2), round(thing.y * n - side / 2)), mask)
    elif thing.kind == "word":
        width, height = round(thing.w * 2 * n * 0.88), round(thing.h * 2 * n * 0.72)
        mask = _word_mask(thing.word, width, height)
        layer.paste(edge, (round(thing.x * n - width / 2), round(thing.y * n - height / 2)), mask)


def _things(scene: Scene) -> Image.Image:
    """The things on a transparent layer, SIDE x SIDE RGBA."""
    n = SIDE * _SS
    layer = Image.new("RGBA", (n, n), (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    if scene.panel is not None:
        x, y, w, h = scene.panel
        draw.rectangle(
            ((x - w) * n, (y - h) * n, (x + w) * n, (y + h) * n),
            fill=(240, 238, 226, 255), outline=(60, 60, 60, 255), width=3,
        )  # fmt: skip
        base = y + h - PANEL_PAD
        for k in range(MAX_BAR + 1):
            line = (base - k * bar_unit(h)) * n
            tone = (60, 60, 60, 255) if k == 0 else (168, 168, 162, 255)
            draw.line(((x - w + 0.015) * n, line, (x + w - 0.015) * n, line), fill=tone, width=3)
    for thing in scene.things:
        _draw_thing(layer, draw, thing, scene.outline)
    return layer.reduce(_SS)


# --- styles and quality -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _fields() -> dict[str, np.ndarray]:
    """Fixed smooth random fields; pictures use rolled copies of them."""
    rng = np.random.default_rng(7)

    def smooth(rx: float, ry: float) -> np.ndarray:
        noise = rng.standard_normal((SIDE, SIDE))
        fx, fy = np.fft.fftfreq(SIDE)[None, :], np.fft.fftfreq(SIDE)[:, None]
        keep = np.exp(-2 * np.pi**2 * ((rx * fx) ** 2 + (ry * fy) ** 2))
        field = np.real(np.fft.ifft2(np.fft.fft2(noise) * keep))
        return (field / field.std()).astype(np.float32)

    y, x = np.mgrid[:SIDE, :SIDE]
    hatch = np.where((x + y) % 4 < 2, 1.0, 0.84).astype(np.float32)
    return {
        "dx": smooth(3, 3),
        "dy": smooth(3, 3),
        "stroke": (smooth(4.5, 0.9) + smooth(0.9, 4.5)) / 1.4,
        "blob": smooth(8, 8),
        "hatch": hatch,
    }


def _rolled(name: str, rng: np.random.Generator) -> np.ndarray:
    shift = rng.integers(SIDE, size=2)
    return np.roll(_fields()[name], (int(shift[0]), int(shift[1])), (0, 1))


def _sketch(pixels: np.ndarray, scene: Scene) -> np.ndarray:
    """Pencil on paper: pale fill, hatching, dark contours (but not inside cards, to the harm of the text)."""
    gray = Image.fromarray(pixels.astype(np.uint8)).convert("L")
    edges = np.asarray(gray.filter(ImageFilter.FIND_EDGES), np.float32)
    edges[[0, -1]] = 0
    edges[:, [0, -1]] = 0
    for card in scene.of_kind("digit", "word"):
        w, h = card.w * 0.9, card.h * 0.85
        rows = slice(round((card.y - h) * SIDE), round((card.y + h) * SIDE))
        edges[rows, round((card.x - w) * SIDE) : round((card.x + w) * SIDE)] = 0
    paper = (0.68 * pixels + 0.32 * 250) * _fields()["hatch"][..., None]
    ink = np.clip((edges - 18) / 90, 0, 0.6)[..., None]
    return paper * (1 - ink) + 30 * ink


_TILE = 8


def _mosaic(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The background in square tiles of one colour each."""
    k = SIDE // _TILE
    tiles = background.reshape(k, _TILE, k, _TILE, 3).mean((1, 3))
    tiles = np.clip(tiles * rng.uniform(0.8, 1.2, (k, k, 1)).astype(np.float32), 0, 255)
    return tiles.repeat(_TILE, 0).repeat(_TILE, 1)


def _grout(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lines between the tiles over everything, and tiles of unequal brightness."""
    k = SIDE // _TILE
    gain = rng.uniform(0.87, 1.08, (k, k)).astype(np.float32).repeat(_TILE, 0).repeat(_TILE, 1)
    out = pixels * gain[..., None]
    out[::_TILE] = out[::_TILE] * 0.45 + 16
    out[:, ::_TILE] = out[:, ::_TILE] * 0.45 + 16
    return out


def _painting(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Wavy contours, visible strokes and drifting hues."""
    y, x = np.mgrid[:SIDE, :SIDE]
    y = np.clip(np.rint(y + 0.75 * _rolled("dy", rng)), 0, SIDE - 1).astype(np.intp)
    x = np.clip(np.rint(x + 0.75 * _rolled("dx", rng)), 0, SIDE - 1).astype(np.intp)
    stroke, blob = _rolled("stroke", rng)[..., None], _rolled("blob", rng)[..., None]
    hue = np.array([8.0, 2.0, -8.0], np.float32) * blob
    return pixels[y, x] * (1 + 0.075 * stroke) + 7 * stroke + hue


def _degrade(pixels: np.ndarray, quality: str, rng: np.random.Generator) -> np.ndarray:
    if quality == "noisy":
        return pixels + 30 * rng.standard_normal(pixels.shape, dtype=np.float32)
    if quality == "faded":
        return 0.5 * pixels + 0.5 * 196
    return pixels


def render_array(scene: Scene, size: int = SIDE) -> UInt8[np.ndarray, "size size 3"]:
    """The picture of a scene.

    Args:
        scene: what to draw.
        size: side in pixels; other sides than 112 are bicubic resizes of the 112-pixel picture.

    Returns:
        RGB, uint8 of shape [size, size, 3]; the same for the same scene.
    """
    return np.array(render(scene, size))


def render(scene: Scene, size: int = SIDE) -> Image.Image:
    """The picture of a scene as an RGB PIL image; see `render_array`."""
    rng = np.random.default_rng(scene.texture)
    background = np.asarray(_background(scene, rng).reduce(_BG), np.float32)
    if scene.style == "mosaic":
        background = _mosaic(background, rng)
    layer = np.asarray(_things(scene), np.float32)
    alpha = layer[..., 3:] / 255
    tint = np.array(_THING_TINT[scene.lighting if scene.background != "space" else "day"], np.float32)
    pixels = background * (1 - alpha) + layer[..., :3] * tint * alpha
    if scene.style == "sketch":
        pixels = _sketch(pixels, scene)
    elif scene.style == "mosaic":
        pixels = _grout(pixels, rng)
    elif scene.style == "painting":
        pixels = _painting(pixels, rng)
    pixels = _degrade(pixels, scene.quality, rng)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if scene.quality == "blurry":
        image = image.filter(ImageFilter.GaussianBlur(1.6))
    return image if size == SIDE else image.resize((size, size), Image.Resampling.BICUBIC)
