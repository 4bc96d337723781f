"""Training curves from a run's `metrics.jsonl`."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from mllm_jax.evaluation.report import plots
from mllm_jax.evaluation.report.plots import PALETTE, series_style, showable
from mllm_jax.storage import Path, as_path, read_text

LOSS = "loss per supervised token"


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage -> records of `metrics.jsonl` by step; where a step was written again after a restart, the last counts.

    Raises:
      ValueError: no records, or a damaged line that is not the last; names file and line.
    """
    stages: dict[str, dict[int, dict[str, Any]]] = {}
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            stage, step = str(record.get("stage", "")), int(record["step"])
            numbers = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
            stages.setdefault(stage, {})[step] = numbers | {"step": step, "loss": float(record["loss"])}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
    plot_loss_curves({"": read_metrics(as_path(metrics))}, as_path(out))


def plot_loss_curves(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], out: Path) -> None:
    """Loss curves of several runs, a column per stage; one run alone also gets learning rate and gradients.

    Args:
      runs: run's name -> stage -> records.
      out: the PNG.
    """
    stages = list(dict.fromkeys(stage for run in runs.values() for stage in run))
    if len(runs) != 1:
        plot_curves(runs, out, "loss", LOSS)
        return
    ((name, run),) = runs.items()
    figure = plots.new_figure(4.8 * max(len(stages), 1) + 0.6, 5.4)
    grid = figure.subplots(2, len(stages), squeeze=False, height_ratios=[2, 1], sharex="col")
    for column, stage in enumerate(stages):
        top, bottom = grid[0][column], grid[1][column]
        _curve(top, run[stage], "loss", name, 0, with_raw=True)
        _headed(top, stage, LOSS if column == 0 else "")
        _rates(bottom, run[stage], column == 0, column == len(stages) - 1)
        _steps(bottom)
    figure.tight_layout()
    plots.save_figure(figure, out)


def plot_curves(
    runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    out: Path,
    key: str,
    axis: str,
    logarithmic: bool = False,
) -> None:
    """Curves of several runs in one picture, a column per stage.

    Args:
      runs: run's name -> stage -> records.
      out: the PNG.
      key: of the value in the records.
      axis: how it is called.
      logarithmic: its scale.
    """
    stages = list(dict.fromkeys(stage for run in runs.values() for stage in run))
    named = 0.2 * -(-len(runs) // 2)  # inches for the legend
    figure = plots.new_figure(4.8 * max(len(stages), 1) + 0.6, 3.8 + named)
    for column, (axes, stage) in enumerate(
        zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True)
    ):
        for index, (name, run) in enumerate(runs.items()):
            if records := run.get(stage, ()):
                _curve(axes, records, key, name, index, with_raw=False)
        _headed(axes, stage, axis if column == 0 else "")
        if logarithmic and any(record[key] > 0 for run in runs.values() for record in run.get(stage, ())):
            _log_scale(axes)
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        _steps(axes)
    figure.tight_layout()
    plots.save_figure(figure, out)


def _headed(axes: Axes, stage: str, name: str) -> None:
    axes.set_title(showable(stage), fontsize=12, fontweight="bold")
    axes.set_ylabel(name)
    plots.plain_axes(axes)


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _values(records: Sequence[Mapping[str, Any]], key: str) -> Float[np.ndarray, " n"]:
    """A column of the log, NaN where a record lacks it."""
    return np.array([record.get(key, math.nan) for record in records], float)


def _marker(records: Sequence[Any]) -> str | None:
    """So few records make no line."""
    return "o" if len(records) < 3 else None


def _curve(
    axes: Axes, records: Sequence[Mapping[str, Any]], key: str, name: str, index: int, with_raw: bool
) -> None:
    style = series_style(index)
    steps, losses = _values(records, "step"), _values(records, key)
    half = len(losses) // 40
    smooth = np.array([losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))])
    if with_raw and half:
        axes.plot(steps, losses, color=style["color"], alpha=0.3, linewidth=1)
    axes.plot(steps, smooth, linewidth=2, label=showable(name), marker=_marker(records), **style)
    if with_raw:
        text = {"ha": "right", "fontsize": 10, "color": style["color"], "fontweight": "bold"}
        end = (steps[-1], smooth[-1])
        axes.annotate(f"{smooth[-1]:.3f}", end, xytext=(0, 8), textcoords="offset points", **text)


def _rates(axes: Axes, records: Sequence[Mapping[str, Any]], left: bool, right: bool) -> None:
    """Gradient norms per module (left scale, logarithmic) and learning rate (right scale)."""
    steps, marker = _values(records, "step"), _marker(records)
    keys = sorted({key for record in records for key in record if key.startswith("grad_norm")})
    for index, key in enumerate(keys):
        name = key.removeprefix("grad_norm").strip("/_") or "all"
        color = "black" if name == "all" else PALETTE[(index + 1) % (len(PALETTE) - 1)]
        shown = {"color": color, "linewidth": 1.2, "marker": marker, "label": f"gradient, {name}"}
        axes.plot(steps, _values(records, key), **shown)
    if any(record.get(key, 0) > 0 for record in records for key in keys):
        _log_scale(axes)
    axes.set_ylabel("gradient norm" if left else "")
    plots.plain_axes(axes)
    rate, color = axes.twinx(), PALETTE[0]
    rates = _values(records, "learning_rate")
    rate.plot(steps, rates, color=color, linestyle="--", linewidth=1.4, marker=marker)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.tick_params(colors=color, labelsize=9)
    rate.yaxis.get_offset_text().set_color(color)
    rate.set_ylabel("learning rate" if right else "", color=color)
    rate.spines["top"].set_visible(False)
    if keys:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
