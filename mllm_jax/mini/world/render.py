"""Drawing of mini-world scenes: 112 pixels a side, antialiased, about 3 ms an image."""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mllm_jax.mini.world.backgrounds import empty_scene
from mllm_jax.mini.world.digits import digits
from mllm_jax.mini.world.scene import MAX_BAR, PANEL_PAD, Scene, Thing, bar_unit

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
    polygons = {
        "circle": [(math.cos(t), math.sin(t)) for t in turn],
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "rectangle": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
        "star": [(x, y + 0.06) for x, y in star],
        "diamond": [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)],
        "cross": [*cross, (-a, -a)],
        "heart": heart,
    }
    return {name: [(float(x), float(y)) for x, y in points] for name, points in polygons.items()}


def silhouette(thing: Thing) -> Points:
    """The polygon a thing covers, in fractions of the image's side."""
    base = _unit_polygons()[thing.shape or "square"]
    cos, sin = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
    return [
        (
            thing.x + u * thing.w * cos - v * thing.h * sin,
            thing.y + u * thing.w * sin + v * thing.h * cos,
        )
        for u, v in base
    ]


_THING_TINT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.93, 0.84), "night": (0.82, 0.84, 0.94)}

# --- things -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=1)
def _digit_images() -> np.ndarray:
    return (digits()[0] * (255 / 16)).astype(np.uint8)


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
    """Fixed smooth random fields; images use rolled copies of them."""
    rng = np.random.default_rng(7)

    def smooth(rx: int | float, ry: int | float) -> np.ndarray:
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
    """The background in square tiles of one color each."""
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


def _degrade(pixels: np.ndarray, quality: str, damage: float, rng: np.random.Generator) -> np.ndarray:
    if quality == "noisy":
        return pixels + 30 * damage * rng.standard_normal(pixels.shape, dtype=np.float32)
    if quality == "faded":
        return _mixed(pixels, np.float32(196), 0.5 * damage)
    return pixels


def _mixed(plain: np.ndarray, other: np.ndarray | np.float32, share: float) -> np.ndarray:
    """`plain` and a share of `other`; with a share of 1 exactly `other`."""
    return other if share == 1 else np.float32(1 - share) * plain + np.float32(share) * other


def _background(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The empty scene behind its haze and under its specks, SIDE x SIDE."""
    image = empty_scene(scene, SIDE * _BG, rng)
    if scene.view < 1:
        haze = tuple(int(v) for v in rng.integers(90, 230, 3))
        image = Image.blend(Image.new("RGB", image.size, haze), image, scene.view)
    draw = ImageDraw.Draw(image)
    for x, y, r, *rgb in rng.random((scene.clutter, 6)) * [SIDE * _BG, SIDE * _BG, 3, 255, 255, 255]:
        box = (x - 2 - r, y - 2 - r, x + 2 + r, y + 2 + r)
        (draw.ellipse if r < 1.5 else draw.rectangle)(box, fill=tuple(int(v) for v in rgb))
    return image.reduce(_BG)


def render_array(scene: Scene, size: int = SIDE) -> UInt8[np.ndarray, "size size 3"]:
    """The image of a scene.

    Args:
        scene: what to draw.
        size: side in pixels; other sides than 112 are bicubic resizes of the 112-pixel image.

    Returns:
        RGB, uint8 of shape [size, size, 3]; the same for the same scene.
    """
    return np.array(render(scene, size))


def render(scene: Scene, size: int = SIDE) -> Image.Image:
    """The image of a scene as an RGB PIL image; see `render_array`."""
    rng = np.random.default_rng(scene.texture)
    background = np.asarray(_background(scene, rng), np.float32)
    if scene.style == "mosaic":
        background = _mixed(background, _mosaic(background, rng), scene.style_strength)
    layer = np.asarray(_things(scene), np.float32)
    alpha = layer[..., 3:] / 255
    tint = np.array(_THING_TINT[scene.lighting if scene.background != "space" else "day"], np.float32)
    pixels = background * (1 - alpha) + layer[..., :3] * tint * alpha
    styled = pixels
    if scene.style == "sketch":
        styled = _sketch(pixels, scene)
    elif scene.style == "mosaic":
        styled = _grout(pixels, rng)
    elif scene.style == "painting":
        styled = _painting(pixels, rng)
    pixels = _mixed(pixels, styled, scene.style_strength)
    pixels = _degrade(pixels, scene.quality, scene.damage, rng)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if scene.quality == "blurry":
        image = image.filter(ImageFilter.GaussianBlur(1.6 * scene.damage))
    return image if size == SIDE else image.resize((size, size), Image.Resampling.BICUBIC)
