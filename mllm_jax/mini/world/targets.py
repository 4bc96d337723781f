"""Dense and global classification targets of mini-world scenes, for pretraining towers and for probes."""

import numpy as np
from jaxtyping import Int32
from PIL import Image, ImageDraw

from mllm_jax.mini.world.render import silhouette
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

NONE = "none"
MAX_COUNT = 8
PATCH_CLASSES: dict[str, tuple[str, ...]] = {
    "shape": (NONE, *SHAPES, "digit", "word", "bar"),
    "color": (NONE, *COLORS),
    "digit": (NONE, *(str(d) for d in range(10))),
    "word": (NONE, *WORDS),
    "size": (NONE, *SIZES),
    "place": (NONE, *POSITIONS),  # of the thing; a tower has to keep where things are
    "value": (NONE, *(str(n) for n in range(1, MAX_BAR + 1))),  # height of a bar
    "same": (NONE, *(str(n) for n in range(1, MAX_COUNT + 1))),  # shapes of this kind in the image
}
GLOBAL_CLASSES: dict[str, tuple[str, ...]] = {
    "scene": SCENES,
    "lighting": LIGHTING,
    "style": STYLES,
    "quality": QUALITY,
    "topic": TOPICS,
    "things": tuple(str(n) for n in range(MAX_COUNT + 1)),
    "bars": tuple(str(n) for n in range(5)),
    **{f"count_{shape}": tuple(str(n) for n in range(MAX_COUNT + 1)) for shape in SHAPES},
    "position": (NONE, *POSITIONS),  # of the only thing beside a chart's bars
}

_SUB = 6  # samples per patch and axis
_LEAST = 0.2  # share of a patch that a thing has to cover to name it


def _classes(scene: Scene, thing: Thing) -> dict[str, int]:
    kind = thing.shape if thing.kind == "shape" else thing.kind
    return {
        "shape": PATCH_CLASSES["shape"].index(kind),
        "color": 1 + COLORS.index(thing.color),
        "digit": 1 + thing.digit,
        "word": 1 + WORDS.index(thing.word) if thing.word else 0,
        "size": 1 + SIZES.index(thing.size) if thing.size else 0,
        "place": 1 + POSITIONS.index(thing.position),
        "value": thing.value,
        "same": sum(t.shape == thing.shape for t in scene.shapes) if thing.kind == "shape" else 0,
    }


def patch_owners(scene: Scene, grid: int) -> Int32[np.ndarray, " patches"]:
    """Which thing each patch shows.

    A patch belongs to the thing that covers most of it, if that is at least a fifth of the patch; the patch
    that holds a thing's center is given to it when nothing else claims it, so that every thing is named.

    Args:
        scene: the scene.
        grid: patches per side.

    Returns:
        int32 [grid * grid] in raster order: number of the thing in `scene.things` plus 1, or 0.
    """
    n = grid * _SUB
    ids = Image.new("L", (n, n))
    draw = ImageDraw.Draw(ids)
    for i, thing in enumerate(scene.things, start=1):
        draw.polygon([(x * n - 0.5, y * n - 0.5) for x, y in silhouette(thing)], fill=i)
    blocks = np.asarray(ids).reshape(grid, _SUB, grid, _SUB)
    share = np.stack([(blocks == i).mean((1, 3)) for i in range(1, len(scene.things) + 1)] or
                     [np.zeros((grid, grid))])  # fmt: skip
    owners = np.where(share.max(0) >= _LEAST, share.argmax(0) + 1, 0).astype(np.int32)
    for i, thing in enumerate(scene.things, start=1):
        at = min(int(thing.y * grid), grid - 1), min(int(thing.x * grid), grid - 1)
        if owners[at] == 0:
            owners[at] = i
    return owners.reshape(-1)


def patch_targets(scene: Scene, grid: int) -> dict[str, Int32[np.ndarray, " patches"]]:
    """Classes of what each patch of a grid x grid lattice shows.

    Args:
        scene: the scene.
        grid: patches per side.

    Returns:
        For each key of `PATCH_CLASSES` an int32 array [grid * grid] in raster order: indices into its
        classes.
    """
    owners = patch_owners(scene, grid)
    tables = {name: np.zeros(len(scene.things) + 1, np.int32) for name in PATCH_CLASSES}
    for i, thing in enumerate(scene.things, start=1):
        for name, value in _classes(scene, thing).items():
            tables[name][i] = value
    return {name: table[owners] for name, table in tables.items()}


def global_targets(scene: Scene) -> dict[str, int]:
    """Classes of the whole image: for each key of `GLOBAL_CLASSES` an index into its classes."""
    out = {
        "scene": SCENES.index(scene.background),
        "lighting": LIGHTING.index(scene.lighting),
        "style": STYLES.index(scene.style),
        "quality": QUALITY.index(scene.quality),
        "topic": TOPICS.index(scene.topic),
        "things": len(scene.of_kind("shape", "digit", "word")),
        "bars": len(scene.bars),
    }
    for shape in SHAPES:
        out[f"count_{shape}"] = sum(t.shape == shape for t in scene.shapes)
    things = scene.of_kind("shape", "digit", "word")
    out["position"] = GLOBAL_CLASSES["position"].index(things[0].position if len(things) == 1 else NONE)
    return out
