"""Contact sheets: images of the mini world beside their captions and questions, to look at."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mllm_jax.mini.world.captions import long_caption
from mllm_jax.mini.world.render import SIDE, render
from mllm_jax.mini.world.sampler import sample_scene
from mllm_jax.mini.world.text import pick_questions

_TEXT_WIDTH = 330
_COLUMNS = 3
_QUESTIONS = 5


def contact_sheet(n: int, seed: int, split: str = "finetune", size: int = SIDE) -> Image.Image:
    """The first `n` images of a split with captions and a few questions each.

    Args:
        n: number of images.
        seed: which world.
        split: one of `scene.SPLITS`.
        size: resolution the images are shown at (enlarged to a common size without smoothing).
    """
    font, shown = ImageFont.load_default(size=11), 2 * SIDE
    width, height = shown + _TEXT_WIDTH, shown + 12
    rows = -(-n // _COLUMNS)
    sheet = Image.new("RGB", (width * min(n, _COLUMNS), height * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(n):
        scene = sample_scene(seed, index, split)
        rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
        x, y = index % _COLUMNS * width, index // _COLUMNS * height
        sheet.paste(render(scene, size).resize((shown, shown), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(long_caption(scene, rng), 56)
        for question in pick_questions(scene, rng, _QUESTIONS):
            options = " / ".join(question.options)
            lines += ["", *textwrap.wrap(f"{question.ability}: {question.text} [{options}]", 56)]
            lines.append(f"   -> {question.answer}")
        draw.multiline_text((x + shown + 8, y + 2), "\n".join(lines[:17]), fill="black", font=font, spacing=1)
    return sheet
