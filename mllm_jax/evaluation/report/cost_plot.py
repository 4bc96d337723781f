"""Accuracy against a cost (visual tokens, step time): one small plot per group, so that each reads on a phone."""

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from mllm_jax.evaluation.report import plots
from mllm_jax.evaluation.tables import label
from mllm_jax.storage import Path

_TICKS = 6  # so many different costs are written out on the axis


@dataclasses.dataclass(frozen=True)
class CostPoint:
    """One run.

    Attributes:
      series: what has a color of its own, e.g. a connector.
      mark: what tells the runs of a series apart, e.g. the resolution; "" if nothing does.
      cost: on the horizontal axis.
      scores: group -> score from 0 to 1.
      line: which runs of a series a line joins, e.g. those with one number of visual tokens.
    """

    series: str
    mark: str
    cost: float
    scores: Mapping[str, float]
    line: str = ""


def plot_cost(points: Sequence[CostPoint], group: str, x_label: str, out: Path) -> None:
    """Accuracy on one group against a cost: a color per series, a marker shape per mark.

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
    shape = {mark: plots.MARKERS[index % len(plots.MARKERS)] for index, mark in enumerate(marks)}
    points = sorted((p for p in points if group in p.scores), key=lambda point: point.cost)
    if not points:
        raise ValueError(f"no run has a score for {group!r}")
    below = -(-len(names) // 2) + (len(marks) > 1)  # lines of the legends
    figure = plots.new_figure(4.4, 3.1 + plots.LEGEND_LINE * below)
    axes = figure.add_subplot()
    handles = []
    for index, name in enumerate(names):
        style = plots.series_style(index)
        mine = [point for point in points if point.series == name]
        for line in dict.fromkeys(point.line for point in mine):
            joined = [(point.cost, 100 * point.scores[group]) for point in mine if point.line == line]
            axes.plot(*zip(*joined, strict=True), **style)
        for point in mine:
            look = {"color": style["color"], "marker": shape[point.mark], "markersize": 7, "alpha": 0.85}
            axes.plot(point.cost, 100 * point.scores[group], **look)
        if len(marks) == 1:
            style |= {"linestyle": "", "marker": shape[marks[0]]}
        handles.append(Line2D([], [], label=plots.showable(name), **style))
    axes.margins(x=0.08, y=0.15)
    costs = sorted({point.cost for point in points})
    if len(costs) <= _TICKS and all(cost.is_integer() for cost in costs):
        axes.set_xticks(costs)
    axes.set_title(plots.showable(label(group)), fontsize=12, fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel("accuracy, %")
    plots.plain_axes(axes)
    figure.tight_layout(rect=(0, plots.LEGEND_LINE * below / figure.get_figheight(), 1, 1))
    plots.legend_below(figure, handles, 2, lines=len(marks) > 1)
    if len(marks) > 1:
        forms = [
            Line2D([], [], color=plots.GREY, linestyle="", marker=shape[m], label=plots.showable(m))
            for m in marks
        ]
        plots.legend_below(figure, forms, len(forms))
    plots.save_figure(figure, out)
