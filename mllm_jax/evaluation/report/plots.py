"""Pictures of results as PNG: loss curves, example sheet, and what all plots share. No global matplotlib state.

Radar charts are in `radar.py`, accuracy against cost in `cost_plot.py`.
"""

import base64
import functools
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from PIL import Image

from mllm_jax import files
from mllm_jax.evaluation.tables import label

# Okabe and Ito's palette: told apart with every kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))  # tell colours apart that come again
GREY = "#666666"
RIGHT, WRONG, NEUTRAL = "#0072B2", "#D55E00", "#444444"
DPI = 150
_CELL, _PICTURE, _LINE = 3.1, 2.6, 0.17  # of the example sheet, in inches
_MOST_LINES = 10  # of a question or an answer on the sheet


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage -> records of `metrics.jsonl` by step; where a step was written again after a restart, the last counts.

    Raises:
      ValueError: no records, or a damaged line that is not the last; names file and line.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            stages.setdefault(str(record.get("stage", "")), {})[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # cut off while it was written
                break
            raise ValueError(f"{path} line {number} is damaged: {error}") from error
    if not stages:
        raise ValueError(f"{path}: no records")
    return {stage: [records[step] for step in sorted(records)] for stage, records in stages.items()}


def plot_losses(metrics: Path, out: Path) -> None:
    """Loss, learning rate and gradient norms of every stage, from a run's `metrics.jsonl`.

    Raises:
      ValueError: the file holds no records.
    """
    plot_loss_curves({"": read_metrics(Path(metrics))}, Path(out))


def plot_loss_curves(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], out: Path) -> None:
    """Loss curves of several runs, a column per stage; one run alone also gets learning rate and gradients.

    Args:
      runs: run's name -> stage -> records.
      out: the PNG.
    """
    stages = list(dict.fromkeys(stage for run in runs.values() for stage in run))
    alone = len(runs) == 1
    named = 0.2 * -(-len(runs) // 2)  # inches for the legend
    figure = new_figure(4.8 * max(len(stages), 1) + 0.6, 5.4 if alone else 3.8 + named)
    heights = [2, 1] if alone else [1]
    grid = figure.subplots(len(heights), len(stages), squeeze=False, height_ratios=heights, sharex="col")
    for column, stage in enumerate(stages):
        top = grid[0][column]
        for index, (name, run) in enumerate(runs.items()):
            records = run.get(stage, ())
            if records:
                _loss_line(top, records, name, index, alone)
        top.set_title(showable(stage), fontsize=12, fontweight="bold")
        top.set_ylabel("loss per supervised token" if column == 0 else "")
        plain_axes(top)
        if not alone:
            top.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        if alone:
            _rates(grid[1][column], next(iter(runs.values()))[stage], column == 0, column == len(stages) - 1)
        grid[-1][column].set_xlabel("update")
        grid[-1][column].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.tight_layout()
    save_figure(figure, out)


def _loss_line(
    axes: Axes, records: Sequence[Mapping[str, Any]], name: str, index: int, with_raw: bool
) -> None:
    color = PALETTE[index % len(PALETTE)]
    steps = [record["step"] for record in records]
    losses = np.asarray([record["loss"] for record in records], float)
    half = len(losses) // 40
    smooth = np.asarray([losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))])
    if with_raw and half:
        axes.plot(steps, losses, color=color, alpha=0.3, linewidth=1)
    axes.plot(
        steps,
        smooth,
        color=color,
        linewidth=2,
        linestyle=LINES[index // len(PALETTE) % len(LINES)],
        label=showable(name),
        marker="o" if len(steps) < 3 else None,
    )
    if with_raw:
        axes.annotate(
            f"{smooth[-1]:.3f}",
            (steps[-1], smooth[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            fontsize=10,
            color=color,
            fontweight="bold",
        )


def _rates(axes: Axes, records: Sequence[Mapping[str, Any]], left: bool, right: bool) -> None:
    """Gradient norms per module (left scale, logarithmic) and learning rate (right scale)."""
    steps = [record["step"] for record in records]
    keys = sorted({key for record in records for key in record if key.startswith("grad_norm")})
    for index, key in enumerate(keys):
        name = key.removeprefix("grad_norm").strip("/_") or "all"
        color = "black" if name == "all" else PALETTE[(index + 1) % (len(PALETTE) - 1)]
        values = [record.get(key, math.nan) for record in records]
        axes.plot(
            steps,
            values,
            color=color,
            linewidth=1.2,
            marker="o" if len(steps) < 3 else None,
            label=f"gradient, {name}",
        )
    if any(record.get(key, 0) > 0 for record in records for key in keys):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("gradient norm" if left else "")
    plain_axes(axes)
    rate = axes.twinx()
    rate.plot(
        steps,
        [record.get("learning_rate", math.nan) for record in records],
        color=PALETTE[0],
        linestyle="--",
        linewidth=1.4,
        marker="o" if len(steps) < 3 else None,
    )
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.tick_params(colors=PALETTE[0], labelsize=9)
    rate.yaxis.get_offset_text().set_color(PALETTE[0])
    rate.set_ylabel("learning rate" if right else "", color=PALETTE[0])
    rate.spines["top"].set_visible(False)
    if keys:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def picture_of(uri: str) -> Image.Image:
    """The picture of a base64 data URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def plot_examples(examples: Sequence[Mapping[str, Any]], out: Path) -> None:
    """A sheet of pictures with question, right answer and the model's answer; wrong ones are marked by colour and sign.

    Args:
      examples: from `examples.make_examples`; at least one.
      out: the PNG.
    """
    columns = min(4, len(examples))
    bands = [examples[i : i + columns] for i in range(0, len(examples), columns)]
    # All sizes in inches: a band is a heading, the pictures' box and the text under it.
    heights = [0.35 + _PICTURE + _LINE * (1.5 + max(len(_text(one)) for one in band)) for band in bands]
    width, height = columns * _CELL + 0.1, sum(heights)
    figure = new_figure(width, height)
    top = height
    for band, band_height in zip(bands, heights, strict=True):
        for column, one in enumerate(band):
            left, bottom = (0.15 + column * _CELL) / width, (top - 0.35 - _PICTURE) / height
            box = (left, bottom, (_CELL - 0.25) / width, _PICTURE / height)
            _example(figure.add_axes(box, anchor="SW"), one)
        top -= band_height
    save_figure(figure, out)


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def showable(text: str) -> str:
    """Text with a box for every character that the plots' font lacks, and no mathematics in dollar signs."""
    shown = (char if char == "\n" or ord(char) in _glyphs() else "□" for char in text.replace("\t", " "))
    return "".join(shown).replace("$", r"\$")


def _wrapped(text: str) -> list[str]:
    """Lines of a text; what is too long for a sheet is cut, which the last line says (the page has it all)."""
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, 38) or [""]]
    if len(lines) > _MOST_LINES:
        more = len(lines) - _MOST_LINES + 1
        lines = [*lines[: _MOST_LINES - 1], f"… ({more} more lines)"]
    return lines


def _verdict_color(one: Mapping[str, Any]) -> str:
    return {None: NEUTRAL, True: RIGHT, False: WRONG}[one["right"]]


def _text(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lines under a picture with their colours."""
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
        strip = [np.asarray(picture_of(uri).convert("RGB")) for uri in one["pictures"]]
        height = max(part.shape[0] for part in strip)
        strip = [np.pad(p, ((0, height - p.shape[0]), (0, 4), (0, 0)), constant_values=255) for p in strip]
        axes.imshow(np.concatenate(strip, axis=1)[:, :-4], interpolation="nearest")
    sign = {None: "", True: " ✓", False: " ✗"}[one["right"]]
    heading = label(one["ability"]) + sign
    if heading:
        axes.set_title(showable(heading), fontsize=10, color=color, fontweight="bold", loc="left")
    for number, (line, shade) in enumerate(_text(one)):
        axes.annotate(
            showable(line),
            (0, 0),
            xycoords="axes fraction",
            xytext=(0, -72 * _LINE * (number + 1)),
            textcoords="offset points",
            fontsize=9,
            color=shade,
            fontweight="bold" if shade in (RIGHT, WRONG) else "normal",
        )


def plain_axes(axes: Axes) -> None:
    """A light grid, no frame above and to the right."""
    axes.set_axisbelow(True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out: Path) -> None:
    """Writes a PNG, in a folder that is made if needed."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(out, sync=False) as file:
        figure.savefig(file, dpi=DPI, format="png")
