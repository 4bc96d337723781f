"""Example answers as one PNG: images with question, right answer and the model's answer."""

import base64
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes

from mllm_jax.data.images import decode_image
from mllm_jax.evaluation.report.plots import GREY, new_figure, save_figure, showable
from mllm_jax.evaluation.tables import label
from mllm_jax.storage import Path

RIGHT, WRONG, NEUTRAL = "#0072B2", "#D55E00", "#444444"
_CELL, _IMAGE, _LINE = 3.1, 2.6, 0.17  # of the sheet, in inches
_MOST_LINES = 10  # of a question or an answer
_MOST_PIXELS = 1 << 20  # of an image; `evaluation.examples` writes far smaller ones
_DATA_URI = re.compile(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/]+={0,2})")


def image_of(uri: str, source: str) -> UInt8[np.ndarray, "h w 3"]:
    """The image inside a data URI.

    Args:
      uri: PNG or JPEG in base64; anything else (an address, a file) is not opened.
      source: for the message.

    Raises:
      ValueError: it is no such URI, or its data are no image.
    """
    match = _DATA_URI.fullmatch(uri)
    if match is None:
        raise ValueError(
            f"{source}: an image is no PNG or JPEG in base64 but {uri[:60]!r}; evaluate the run again"
        )
    return decode_image(base64.b64decode(match[1]), source=source, max_pixels=_MOST_PIXELS)


def plot_examples(examples: Sequence[Mapping[str, Any]], out: Path) -> None:
    """A sheet of images with question, right answer and the model's answer; wrong ones are marked by color and sign.

    Args:
      examples: from `examples.make_examples`; at least one.
      out: the PNG.
    """
    columns = min(4, len(examples))
    bands = [examples[i : i + columns] for i in range(0, len(examples), columns)]
    # All sizes in inches: a band is a heading, the images' box and the text under it.
    heights = [0.35 + _IMAGE + _LINE * (1.5 + max(len(_text(one)) for one in band)) for band in bands]
    width, height = columns * _CELL + 0.1, sum(heights)
    figure = new_figure(width, height)
    top = height
    for band, band_height in zip(bands, heights, strict=True):
        for column, one in enumerate(band):
            left, bottom = (0.15 + column * _CELL) / width, (top - 0.35 - _IMAGE) / height
            box = (left, bottom, (_CELL - 0.25) / width, _IMAGE / height)
            _example(figure.add_axes(box, anchor="SW"), one)
        top -= band_height
    save_figure(figure, out)


def _wrapped(text: str) -> list[str]:
    """Lines of a text; what is too long for a sheet is cut, which the last line says (the page has it all)."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, 38) or [""]]
    if len(lines) > _MOST_LINES:
        more = len(lines) - _MOST_LINES + 1
        lines = [*lines[: _MOST_LINES - 1], f"… ({more} more lines)"]
    return lines


def verdict(one: Mapping[str, Any]) -> str:
    """What stands behind a right or a wrong answer: a sign, and the credit if it is partial; "" if it is neither."""
    sign = {None: "", True: " ✓", False: " ✗"}[one["right"]]
    credit = one.get("credit")
    return f"{sign} (credit {credit:.2g})" if credit and 0 < credit < 1 else sign


def _verdict_color(one: Mapping[str, Any]) -> str:
    return {None: NEUTRAL, True: RIGHT, False: WRONG}[one["right"]]


def _text(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines under an image with their colors."""
    rows = [(line, "black") for line in _wrapped(one["question"])]
    if one["right"] is False:
        rows += [(line, "black") for line in _wrapped("right: " + " / ".join(one["answers"]))]
    elif one["right"] is None:
        rows += [(line, GREY) for answer in one["answers"][:1] for line in _wrapped("reference: " + answer)]
    return rows + [(line, _verdict_color(one)) for line in _wrapped("model: " + (one["text"] or "(nothing)"))]


def _example(axes: Axes, one: Mapping[str, Any]) -> None:
    color = _verdict_color(one)
    axes.axis("off")
    if one["pictures"]:
        strip = [image_of(uri, "an example") for uri in one["pictures"]]
        height = max(part.shape[0] for part in strip)
        strip = [np.pad(p, ((0, height - p.shape[0]), (0, 4), (0, 0)), constant_values=255) for p in strip]
        axes.imshow(np.concatenate(strip, axis=1)[:, :-4], interpolation="nearest")
    if heading := label(one["ability"]) + verdict(one):
        axes.set_title(showable(heading), fontsize=10, color=color, fontweight="bold", loc="left")
    for number, (line, shade) in enumerate(_text(one), 1):
        place = {
            "xycoords": "axes fraction",
            "xytext": (0, -72 * _LINE * number),
            "textcoords": "offset points",
        }
        weight = "bold" if shade in (RIGHT, WRONG) else "normal"
        axes.annotate(showable(line), (0, 0), fontsize=9, color=shade, fontweight=weight, **place)
