"""docs/performance.md: each script writes its own section, between two comments that name it."""

import os
import pathlib
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


def write_section(name: str, *paragraphs: str) -> None:
    """Replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; a new section goes to the end."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = "\n\n".join((begin, *(paragraph.strip() for paragraph in paragraphs), end))
    page = PAGE.read_text(encoding="utf-8")
    if begin in page:
        before, rest = page.split(begin)
        page = before + section + rest.split(end)[1]
    else:
        page = f"{page.rstrip()}\n\n{section}\n"
    PAGE.write_text(page, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def machine(*packages: str) -> str:
    """The processor, its cores, and versions of packages: what a figure was measured with."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{model}, {os.cpu_count()} cores, {versions}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and least and greatest in parentheses."""
    least, middle, most = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"
