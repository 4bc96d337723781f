"""Accuracy against a cost (visual tokens, step time): one small plot per group, so that each reads on a phone."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.lines import Line2D

from mllm_jax.evaluation.report.plots import (
    GREY,
    LINES,
    MARKERS,
    PALETTE,
    new_figure,
    plain_axes,
    save_figure,
    showable,
)
from mllm_jax.evaluation.tables import label

_TICKS = 6  # so many different costs are written out on the axis


@dataclasses.dataclass(frozen=True)
class CostPoint:
    """One run.

    Attributes:
      series: what is joined by a line, e.g. one connector at several resolutions.
      mark: what tells the runs of a series apart, e.g. the resolution; "" if nothing does.
      cost: on the horizontal axis.
      scores: group -> score from 0 to 1.
    """

    series: str
    mark: str
    cost: float
    scores: Mapping[str, float]


def plot_cost(points: Sequence[CostPoint], group: str, x_label: str, out: Path) -> None:
    """Accuracy on one group against a cost: a colour per series, a marker shape per mark.

    Args:
      points: the runs; those without the group are left out.
      group: which of their scores.
      x_label: what the cost is.
      out: the PNG.

    Raises:
      ValueError: no run has the group.
    """
    names = list(dict.fromkeys(point.series for point in points))
    marks = list(dict.fromkeys(point.mark for point in points))
    shape = {mark: MARKERS[index % len(MARKERS)] for index, mark in enumerate(marks)}
    points = [point for point in points if group in point.scores]
    if not points:
        raise ValueError(f"no run has a score for {group!r}")
    rows = -(-len(names) // 2) + (len(marks) > 1)
    figure = new_figure(4.4, 3.1 + 0.22 * rows)
    axes = figure.add_subplot()
    handles = []
    for index, name in enumerate(names):
        color = PALETTE[index % len(PALETTE)]
        line = LINES[index // len(PALETTE) % len(LINES)]
        mine = sorted((p for p in points if p.series == name), key=lambda point: point.cost)
        axes.plot([p.cost for p in mine], [100 * p.scores[group] for p in mine], color=color, linestyle=line)
        for point in mine:
            axes.plot(
                point.cost,
                100 * point.scores[group],
                color=color,
                marker=shape[point.mark],
                markersize=7,
                alpha=0.85,
            )
        look = {"linestyle": line} if len(marks) > 1 else {"linestyle": "", "marker": shape[marks[0]]}
        handles.append(Line2D([], [], color=color, label=showable(name), **look))
    axes.margins(x=0.08, y=0.15)
    if len(costs := sorted({point.cost for point in points})) <= _TICKS and all(
        c.is_integer() for c in costs
    ):
        axes.set_xticks(costs)
    axes.set_title(showable(label(group)), fontsize=12, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel("accuracy, %")
    plain_axes(axes)
    figure.tight_layout(rect=(0, 0.22 * rows / figure.get_figheight(), 1, 1))
    below = {"loc": "lower center", "frameon": False, "fontsize": 9, "borderpad": 0.1, "labelspacing": 0.3}
    lift = 0.22 * (len(marks) > 1) / figure.get_figheight()
    figure.legend(handles=handles, ncols=2, bbox_to_anchor=(0.5, lift), **below)
    if len(marks) > 1:
        forms = [Line2D([], [], color=GREY, linestyle="", marker=shape[m], label=showable(m)) for m in marks]
        figure.legend(handles=forms, ncols=len(forms), bbox_to_anchor=(0.5, 0.0), **below)
    save_figure(figure, out)
