"""What a sweep shows: a live table on a terminal, lines elsewhere, and the table of results at the end."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mllm_jax.console import print_table, say
from mllm_jax.escape import terminal
from mllm_jax.storage import Path, is_bucket
from mllm_jax.sweep.cells import Cell, summary
from mllm_jax.sweep.runner import DONE, ELSEWHERE, FAILED, RUNNING, WAITING, Runner, last_lines

STYLES = {RUNNING: "cyan", ELSEWHERE: "blue", DONE: "green", FAILED: "bold red", WAITING: "dim"}
ROOM = 8  # lines of a terminal that the table leaves free


class Display:
    """Follows a runner; use it as a context.

    On a terminal a table is drawn again and again; elsewhere each change is a line.
    """

    def __init__(self, console: Console, directory: Path):
        self._console, self._directory = console, directory
        self._seen: dict[str, str] = {}
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, runner: Runner) -> None:
        """Shows where the cells are now."""
        if self._console.is_terminal:
            self._live.update(self._table(runner), refresh=True)
            return
        counts = Counter(status.state for status in runner.states.values())
        for name, status in runner.states.items():
            before = self._seen.get(name, WAITING)
            self._seen[name] = status.state
            if status.state == before:
                continue
            took = f" in {status.took:.0f} s" if status.took else ""
            why = f": {status.reason}, see {status.log}" if status.state == FAILED else ""
            if status.state == DONE and not took:
                took = " before" if before == WAITING else " by another worker"
            clock = time.strftime("%H:%M:%S")
            say(self._console, f"{clock} {name}: {status.state}{took}{why} ({_counted(counts)})")

    def _table(self, runner: Runner) -> Group:
        counts = Counter(status.state for status in runner.states.values())
        table = Table("cell", "state", "", box=None, pad_edge=False)
        order = (FAILED, RUNNING, ELSEWHERE, DONE, WAITING)
        cells = sorted(runner.cells, key=lambda cell: order.index(runner.states[cell.name].state))
        room = max(1, self._console.height - ROOM)
        for cell in cells[:room]:
            status = runner.states[cell.name]
            table.add_row(
                Text(cell.name),
                Text(status.state, style=STYLES[status.state]),
                Text(self._about(cell, runner)),
            )
        more = [Text(f"... and {len(cells) - room} more", style="dim")] if len(cells) > room else []
        return Group(table, *more, Text(_counted(counts), style="bold"))

    def _about(self, cell: Cell, runner: Runner) -> str:
        status = runner.states[cell.name]
        if status.state == FAILED:
            return status.reason
        if status.state == DONE:
            return f"{status.took:.0f} s" if status.took else ""
        if status.state != RUNNING:
            return ""
        seconds = time.monotonic() - status.since
        return f"{seconds:.0f} s  {_progress(cell.workdir(self._directory))}"


def _counted(counts: Counter) -> str:
    return ", ".join(
        f"{counts[state]} {state}" for state in (DONE, RUNNING, ELSEWHERE, WAITING, FAILED) if counts[state]
    )


def _progress(workdir: Path) -> str:
    """Stage, step and loss of a run, from the last line of its log of metrics."""
    if is_bucket(workdir):
        return ""
    for line in reversed(last_lines(workdir / "metrics.jsonl", 2)):
        try:
            record = json.loads(line)
            return f"{record['stage']} step {record['step']}, loss {record['loss']:.3f}"
        except (ValueError, KeyError, TypeError):  # being written
            continue
    return ""


def print_results(console: Console, cells: Sequence[Cell], directory: Path, states: dict[str, str]) -> None:
    """The table of a sweep: the same for the same runs, however often it was stopped."""
    found = {cell.name: summary(cell.workdir(directory)) for cell in cells if states[cell.name] == DONE}
    columns = dict.fromkeys(
        (benchmark, row["name"])
        for one in found.values()
        for benchmark, values in one["benchmarks"].items()
        for row in values["rows"]
        if row["level"] != "ability"
    )
    several = len({benchmark for benchmark, _ in columns}) > 1
    head = ("%", "state", "visual tokens", *(f"{b}, {c}" if several else c for b, c in columns))
    rows = []
    for cell in cells:
        one: dict[str, Any] = found.get(cell.name, {"benchmarks": {}})
        values = {
            (benchmark, row["name"]): row["values"].get("model")
            for benchmark, entry in one["benchmarks"].items()
            for row in entry["rows"]
            if row["level"] != "ability"
        }
        tokens = str(one["model"]["visual_tokens"]) if "model" in one else ""
        scores = (values.get(column) for column in columns)
        rows.append(
            (cell.name, states[cell.name], tokens, *("" if v is None else f"{100 * v:.1f}" for v in scores))
        )
    print_table(console, head, rows, text_columns=2)


def print_failures(console: Console, runner: Runner) -> None:
    """The cells that failed, each with its log and the last lines of it."""
    for name, status in runner.states.items():
        if status.state == FAILED:
            say(
                console,
                f"\n{name} failed: {status.reason}" + (f"; {status.log}:" if status.log else ""),
                "bold red",
            )
            for line in last_lines(status.log):
                say(console, f"    {terminal(line)}")
