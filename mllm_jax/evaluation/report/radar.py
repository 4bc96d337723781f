"""Radar chart of abilities: one axis each, coloured by group (P1, figures 1 and 4)."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mllm_jax.evaluation.report.plots import GREY, LINES, MARKERS, PALETTE, new_figure, save_figure, showable
from mllm_jax.evaluation.tables import label

GROUP_COLORS = {"coarse": "#009E73", "fine": "#B8860B", "reasoning": "#7B4EA3"}


@dataclasses.dataclass(frozen=True)
class Series:
    """One closed line of a radar chart: ability -> score from 0 to 1; `style` is "model", "blind" or "majority"."""

    name: str
    values: Mapping[str, float]
    style: str = "model"


def plot_radar(
    series: Sequence[Series],
    group_of: Mapping[str, str],
    out: Path,
    title: str = "",
    own_scales: bool = False,
) -> None:
    """Radar chart with one axis per ability, coloured by group.

    Args:
      series: lines; an ability that one of them lacks is a gap there.
      group_of: ability -> group, in the order of the axes; at least three.
      out: the PNG.
      title: heading.
      own_scales: every axis has a scale of its own, as in the paper, written under its name; else all run from 0
        to 100 %.

    Raises:
      ValueError: fewer than three axes.
    """
    names = list(group_of)
    if len(names) < 3:
        raise ValueError(f"a radar chart needs at least three abilities, got {names}")
    scales = {name: own_scale(series, name) if own_scales else (0.0, 1.0) for name in names}
    width = 5.4  # inches: small, so that the words stay readable where the chart is as wide as a phone
    rows = -(-len(series) // 2) + 1  # of the legends
    height = 1.05 + 0.56 * width + 0.6 + 0.22 * rows
    figure = new_figure(width, height)
    box = (0.22, (0.6 + 0.22 * rows) / height, 0.56, 0.56 * width / height)
    axes = figure.add_axes(box, projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    angles = np.linspace(0, 2 * math.pi, len(names), endpoint=False)
    step = angles[1]
    groups = [group for group in dict.fromkeys(group_of.values()) if group]
    colors = group_colors(groups)
    for name, angle in zip(names, angles, strict=True):
        color = colors.get(group_of[name], "black")
        if group_of[name]:
            axes.bar(angle, 1, width=step, color=color, alpha=0.08, zorder=0)
        side = math.sin(angle)
        lines = textwrap.wrap(label(name), 13, break_long_words=False)
        if own_scales:
            lines.append("{:.0f}–{:.0f} %".format(*(100 * end for end in scales[name])))
        axes.text(
            angle,
            1.06,
            showable("\n".join(lines)),
            color=color,
            fontsize=10,
            fontweight="bold",
            ha="center" if abs(side) < 0.1 else "left" if side > 0 else "right",
            va="center" if abs(math.cos(angle)) < 0.9 else "bottom" if math.cos(angle) > 0 else "top",
        )
    handles = []
    models = 0
    for one in series:
        look = _look(one.style, models)
        models += one.style == "model"
        values = [_placed(one.values.get(name, math.nan), scales[name]) for name in names]
        axes.plot([*angles, angles[0]], [*values, values[0]], clip_on=False, **look)  # markers on the rim
        if one.style == "model" and sum(s.style == "model" for s in series) == 1:
            axes.fill(angles, np.nan_to_num(values), color=look["color"], alpha=0.12, zorder=1)
        handles.append(
            Line2D([], [], label=showable(one.name), **{k: v for k, v in look.items() if k != "zorder"})
        )
    axes.set_ylim(0, 1)
    axes.set_xticks(angles, [""] * len(names))
    rings = [""] * 4 if own_scales else ["25", "50", "75", "100 %"]
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], rings, fontsize=8, color=GREY)
    axes.set_rlabel_position(math.degrees(step) / 2)
    axes.grid(color="#bbbbbb", linewidth=0.6)
    axes.spines["polar"].set_color("#bbbbbb")
    if title:
        figure.text(
            0.5, 1 - 0.06 / height, showable(title), ha="center", va="top", fontsize=12, fontweight="bold"
        )
    below = {"loc": "lower center", "frameon": False, "fontsize": 9.5, "borderpad": 0.1, "labelspacing": 0.3}
    figure.legend(handles=handles, bbox_to_anchor=(0.5, 0.22 / height), ncols=2, **below)
    patches = [Patch(color=colors[group], alpha=0.6, label=showable(label(group))) for group in groups]
    if patches:
        figure.legend(handles=patches, bbox_to_anchor=(0.5, 0.0), ncols=4, **below)
    save_figure(figure, out)


def own_scale(series: Sequence[Series], name: str) -> tuple[float, float]:
    """An axis's ends: multiples of 5 % around the models' scores, at least 10 % apart, with 0 % and 100 % as limits."""
    values = [one.values[name] for one in series if one.style == "model" and name in one.values]
    if not values:
        return 0.0, 1.0
    low = max(0, 5 * math.floor((100 * min(values) - 2.5) / 5))
    high = min(100, 5 * math.ceil((100 * max(values) - 1e-9) / 5))
    if high - low < 10:
        low, high = (low, low + 10) if low + 10 <= 100 else (90, 100)
    return low / 100, high / 100


def _placed(value: float, scale: tuple[float, float]) -> float:
    """Where on an axis from 0 to 1 a score lies; outside of the scale it is drawn at its end."""
    return value if math.isnan(value) else min(1.0, max(0.0, (value - scale[0]) / (scale[1] - scale[0])))


def _look(style: str, models: int) -> dict[str, Any]:
    if style == "model":
        color, marker = PALETTE[models % len(PALETTE)], MARKERS[models % len(MARKERS)]
        line = LINES[models // len(PALETTE) % len(LINES)]
        return {
            "color": color,
            "marker": marker,
            "linestyle": line,
            "linewidth": 2,
            "markersize": 5,
            "zorder": 3,
        }
    if style == "blind":
        color = PALETTE[1] if models < 2 else GREY
        return {"color": color, "linestyle": (0, (5, 2)), "linewidth": 1.6, "zorder": 2}
    return {"color": GREY, "linestyle": (0, (1, 1.5)), "linewidth": 1.6, "zorder": 2}


def group_colors(groups: Sequence[str]) -> dict[str, str]:
    """Group -> colour: fixed ones for coarse, fine and reasoning."""
    return {
        group: GROUP_COLORS.get(group, PALETTE[(index + 2) % len(PALETTE)])
        for index, group in enumerate(groups)
    }
