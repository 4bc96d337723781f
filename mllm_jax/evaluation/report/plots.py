"""What all plots share: colours, fonts, figures as PNG; no global matplotlib state."""

import functools
from collections.abc import Sequence
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mllm_jax import files
from mllm_jax.storage import Path, as_path, make_folder

# Okabe and Ito's palette: told apart with every kind of colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))  # tell colours apart that come again
GREY = "#666666"
DPI = 150
LEGEND_LINE = 0.22  # inches


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def showable(text: str) -> str:
    """Text with a box for every character that the plots' font lacks, and no mathematics in dollar signs."""
    shown = (char if char == "\n" or ord(char) in _glyphs() else "□" for char in text.replace("\t", " "))
    return "".join(shown).replace("$", r"\$")


def plain_axes(axes: Axes) -> None:
    """A light grid, no frame above and to the right."""
    axes.set_axisbelow(True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def series_style(index: int) -> dict[str, Any]:
    """Color and line of the series with this number: colors that come again have another line."""
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": LINES[index // len(PALETTE) % len(LINES)]}


def legend_below(figure: Figure, handles: Sequence[Any], columns: int, lines: int = 0) -> None:
    """A legend under everything else, so many lines of text above the lower edge."""
    place = (0.5, LEGEND_LINE * lines / figure.get_figheight())
    figure.legend(
        handles=handles, ncols=columns, loc="lower center", bbox_to_anchor=place, frameon=False, fontsize=9,
        borderpad=0.1, labelspacing=0.3,
    )  # fmt: skip


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, out: Path) -> None:
    """Writes a PNG, in a folder that is made if needed."""
    out = as_path(out)
    make_folder(out.parent)
    with files.replacing(out, sync=False) as file:
        figure.savefig(file, dpi=DPI, format="png")
