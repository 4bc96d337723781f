"""What is shown on a terminal or written to a log: one console, one table, one progress bar for all verbs.

Names are never cut: where a table does not fit between the edges of a terminal, its rows stand under each other.
All text is shown as it is (`escape.terminal`), never taken for rich's markup.
"""

import sys
from collections.abc import Sequence
from io import TextIOBase

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.table import Table
from rich.text import Text

from mllm_jax.escape import terminal

_FILE_WIDTH = 10_000  # a file has no edge: nothing wraps
_ROOM_FOR_BAR = 100  # columns of a terminal on which the progress bar is long


def make_console(file: TextIOBase | None = None) -> Console:
    """A console for `file` (standard output if None); what goes to a file or pipe is not wrapped."""
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and not console.is_jupyter:
        console.width = _FILE_WIDTH
    return console


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a line; a terminal wraps it itself, so that it can be copied whole."""
    console.print(Text(terminal(text), style=style), soft_wrap=True)


def complain(text: str) -> None:
    """Prints a message to standard error."""
    print(terminal(text), file=sys.stderr)


def size_text(count: int | float) -> str:
    """A number of bytes for people.

    Example:
      >>> size_text(1234567)
      '1.23 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def print_table(
    console: Console,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    styles: Sequence[str] = (),
    text_columns: int = 1,
) -> None:
    """Prints a table with every word whole.

    Args:
      console: where to.
      head: names of the columns.
      rows: cells, as many as `head` in each row.
      title: above the table.
      styles: rich styles of the rows; none where it is shorter.
      text_columns: so many columns are text, to the left; the others are numbers.
    """
    table = Table(title=Text(terminal(title), style="bold") if title else None, title_justify="left")
    for number, name in enumerate(head):
        side = "left" if number < text_columns else "right"
        table.add_column(Text(terminal(name)), justify=side, overflow="fold")
    styles = [*styles, *[""] * (len(rows) - len(styles))]
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*(Text(terminal(cell)) for cell in row), style=style)
    needed = Measurement.get(console, console.options.update(max_width=_FILE_WIDTH), table).minimum
    if needed <= console.width:
        console.print(table)
        return
    if title:
        say(console, title, "bold")
    for row, style in zip(rows, styles, strict=True):
        first, *rest = zip(head, row, strict=True)
        say(console, first[1].strip() or "–", style or "bold")
        for name, cell in rest:
            say(console, f"  {name}: {cell}" if name else f"  {cell}")


class _Shown(ProgressColumn):
    """A task's field `shown`, if it has one."""

    def render(self, task: ProgressTask) -> Text:
        return Text(str(task.fields.get("shown", "")))


def progress_bar(console: Console | None = None, show: bool = True, transient: bool = False) -> Progress:
    """A bar per task: description, share done, what the task's field `shown` says, time left (in the end: taken).

    Args:
      console: where to; `make_console()` if None.
      show: False for silence, e.g. on all processes but the first.
      transient: the bar vanishes when it is done.
    """
    console = console or make_console()
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24 if console.width >= _ROOM_FOR_BAR else 8),
        MofNCompleteColumn(),
        _Shown(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not show,
        transient=transient,
        refresh_per_second=2,
    )


def write_anything() -> None:
    """Lets standard output and error spell out what their encoding lacks, instead of failing in the middle."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
