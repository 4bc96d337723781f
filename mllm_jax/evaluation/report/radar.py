"""Radar chart of abilities: one axis each, colored by group (P1, figures 1 and 4)."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mllm_jax.evaluation.report import plots
from mllm_jax.evaluation.tables import label
from mllm_jax.storage import Path

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
    """Radar chart with one axis per ability, colored by group.

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
    scales = [own_scale(series, name) if own_scales else (0.0, 1.0) for name in names]
    width = 5.4  # inches: small, so that the words stay readable where the chart is as wide as a phone
    below = plots.LEGEND_LINE * (-(-len(series) // 2) + 1)  # the legends
    height = 1.05 + 0.56 * width + 0.6 + below
    figure = plots.new_figure(width, height)
    box = (0.22, (0.6 + below) / height, 0.56, 0.56 * width / height)
    axes = figure.add_axes(box, projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    angles = np.linspace(0, 2 * math.pi, len(names), endpoint=False)
    groups = [group for group in dict.fromkeys(group_of.values()) if group]
    colors = group_colors(groups)
    for name, angle, scale in zip(names, angles, scales, strict=True):
        color = colors.get(group_of[name], "black")
        if group_of[name]:
            axes.bar(angle, 1, width=angles[1], color=color, alpha=0.08, zorder=0)
        lines = textwrap.wrap(label(name), 13, break_long_words=False)
        if own_scales:
            lines.append("{:.0f}–{:.0f} %".format(*(100 * end for end in scale)))
        right, up = math.sin(angle), math.cos(angle)  # where the words are, seen from the middle
        place = {
            "ha": "center" if abs(right) < 0.1 else "left" if right > 0 else "right",
            "va": "center" if abs(up) < 0.9 else "bottom" if up > 0 else "top",
        }
        text = plots.showable("\n".join(lines))
        axes.text(angle, 1.06, text, color=color, fontsize=10, fontweight="bold", **place)
    low, high = np.array(scales).T
    handles = []
    models = [one for one in series if one.style == "model"]
    for one in series:
        style = _style(one.style, models.index(one) if one in models else len(models))
        scores = np.array([one.values.get(name, math.nan) for name in names])
        placed = np.clip((scores - low) / (high - low), 0, 1)  # outside of a scale: at its end
        axes.plot([*angles, angles[0]], [*placed, placed[0]], clip_on=False, **style)
        if models == [one]:
            axes.fill(angles, np.nan_to_num(placed), color=style["color"], alpha=0.12, zorder=1)
        handles.append(Line2D([], [], label=plots.showable(one.name), **style))
    axes.set_ylim(0, 1)
    axes.set_xticks(angles, [""] * len(names))
    rings = [""] * 4 if own_scales else ["25", "50", "75", "100 %"]
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], rings, fontsize=8, color=plots.GREY)
    axes.set_rlabel_position(math.degrees(angles[1]) / 2)
    axes.grid(color="#bbbbbb", linewidth=0.6)
    axes.spines["polar"].set_color("#bbbbbb")
    if title:
        heading = {"ha": "center", "va": "top", "fontsize": 12, "fontweight": "bold"}
        figure.text(0.5, 1 - 0.06 / height, plots.showable(title), **heading)
    plots.legend_below(figure, handles, 2, lines=1)
    if groups:
        patches = [
            Patch(color=colors[group], alpha=0.6, label=plots.showable(label(group))) for group in groups
        ]
        plots.legend_below(figure, patches, 4)
    plots.save_figure(figure, out)


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


def _style(kind: str, index: int) -> dict[str, Any]:
    """How the line of a model (the one with this number) or of a baseline looks (`index`: the number of models)."""
    if kind == "model":
        marker = plots.MARKERS[index % len(plots.MARKERS)]
        return plots.series_style(index) | {"marker": marker, "linewidth": 2, "markersize": 5, "zorder": 3}
    color = plots.PALETTE[1] if kind == "blind" and index < 2 else plots.GREY
    dashes = (0, (5, 2) if kind == "blind" else (1, 1.5))
    return {"color": color, "linestyle": dashes, "linewidth": 1.6, "zorder": 2}


def group_colors(groups: Sequence[str]) -> dict[str, str]:
    """Group -> color: fixed ones for coarse, fine and reasoning."""
    others = {group: plots.PALETTE[(index + 2) % len(plots.PALETTE)] for index, group in enumerate(groups)}
    return {group: GROUP_COLORS.get(group, other) for group, other in others.items()}
