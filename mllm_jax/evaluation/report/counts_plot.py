"""How many tokens, supervised tokens and images the samples of a data set have, as histograms."""

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from mllm_jax.data.counts import Counts
from mllm_jax.evaluation.report import plots
from mllm_jax.evaluation.report.plots import GREY, PALETTE
from mllm_jax.storage import Path

BINS = 48
_SHOWN = 99.5  # per cent of the samples that are drawn at their place; longer ones count into the last bin
_BARS = 12  # numbers of images with a bar of their own


def plot_counts(counts: Counts, row_length: int, out: Path) -> None:
    """Draws three histograms: tokens a sample with the row length, supervised tokens, and images.

    Args:
      counts: of at least one sample.
      row_length: in tokens.
      out: the PNG.
    """
    figure = plots.new_figure(11.5, 3.6)
    tokens, supervised, images = figure.subplots(1, 3, width_ratios=[1.4, 1.2, 1])
    _histogram(tokens, counts.tokens, "tokens a sample (visual tokens included)", PALETTE[0])
    over = counts.tokens > row_length
    share = f"{over.mean():.2%} of the samples are" if over.any() else "no sample is"
    if row_length <= 1.3 * tokens.get_xlim()[1]:
        tokens.axvline(row_length, color=PALETTE[1], linewidth=1.6, linestyle=(0, (5, 1.5)))
        tokens.set_xlim(right=max(tokens.get_xlim()[1], 1.04 * row_length))
    tokens.set_title(f"row length {row_length:,}; {share} longer", color=PALETTE[1], fontsize=10)
    _histogram(supervised, counts.supervised, "supervised tokens a sample", PALETTE[2])
    learned = counts.supervised.sum(dtype=np.int64) / counts.tokens.sum(dtype=np.int64)
    supervised.set_title(f"{learned:.1%} of all tokens", color=GREY, fontsize=10)
    _bars(images, counts.images)
    tokens.set_ylabel("samples")
    for axes in (tokens, supervised, images):
        plots.plain_axes(axes)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.tight_layout(w_pad=2)
    plots.save_figure(figure, out)


def _histogram(axes: Axes, values: Int[np.ndarray, " N"], label: str, color: str) -> None:
    low, high = int(values.min()), int(np.percentile(values, _SHOWN, method="higher"))
    bins = np.linspace(low, high + 1, min(BINS, high - low + 1) + 1)
    axes.hist(np.minimum(values, high), bins=bins, color=color)
    median, most = int(np.median(values)), int(values.max())
    end = f", longest {most:,} (in the last bar)" if most > high else f", longest {most:,}"
    axes.set_xlabel(f"{label}\nmedian {median:,}{end}")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _bars(axes: Axes, images: Int[np.ndarray, " N"]) -> None:
    groups, samples = np.unique(np.minimum(images, _BARS), return_counts=True)
    bars = axes.bar(groups, samples, width=0.7, color=PALETTE[5])
    axes.bar_label(bars, [f"{count:,}" for count in samples], fontsize=8, color=GREY, padding=2)
    axes.set_xticks(groups, [f"{group}+" if group == _BARS else str(group) for group in groups])
    axes.set_xlabel("images a sample")
    axes.set_title("0: text alone" if groups[0] == 0 else "", color=GREY, fontsize=10)
    axes.margins(y=0.12)
    axes.set_xlim(min(groups[0], 1) - 1, max(groups[-1], 2) + 1)
