"""Score every answer file of a data folder and compare with the official scorers' results, digit for digit.

    mllm-jax score-all --data DIR
    mllm-jax score-all --data DIR --markdown        the table of docs/benchmarks.md

`--rows` adds, where DIR has them, the official readings of single answers: parsed letters, accuracies, tokens.
DIR holds one folder per benchmark (mme, pope, ...) with answers, annotations and an `expected.json`. The exit
code is 0 if every figure is equal in every digit, 1 if one differs, and 2 if a folder cannot be compared (the others
are).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mllm_jax.console import complain
from mllm_jax.evaluation.reproduce import Comparison, check_rows, score_folder

_HEADER = ("benchmark", "answers", "figure", "expected", "obtained", "difference", "figures equal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax score-all`."""
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder of benchmark folders")
    parser.add_argument("--rows", action="store_true", help="also compare the readings of single answers")
    style = parser.add_mutually_exclusive_group()
    style.add_argument("--markdown", action="store_true", help="print a Markdown table")
    style.add_argument("--json", action="store_true", help="print every compared figure as JSON")


def _number(value: float | int) -> str:
    return "0" if value == 0 else repr(value)


def _rows(done: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [
        (
            one.benchmark,
            one.answers,
            one.headline,
            repr(one.expected),
            repr(one.obtained),
            _number(one.difference),
            f"{len(one.figures) - len(one.differing)}/{len(one.figures)}",
        )
        for one in done
    ]


def _plain(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(row) for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    return "\n".join(f"| {line} |" for line in lines)


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 if any figure differs, 2 if the folder cannot be scored."""
    started = time.perf_counter()
    try:
        done, failed = score_folder(Path(args.data))
        if args.rows:
            rows, unread = check_rows(Path(args.data))
            done += rows
            failed += [message for message in unread if message not in failed]
    except (ValueError, OSError, RuntimeError) as error:
        complain(f"mllm-jax score-all: {error}")
        return 2
    if args.json:
        print(json.dumps([vars(one) for one in done], indent=1))
    else:
        rows = [_HEADER, *_rows(done)]
        print(_markdown(rows) if args.markdown else _plain(rows))
    figures = sum(len(one.figures) for one in done)
    wrong = [f"{one.answers}: {name} {one.figures[name]}" for one in done for name in one.differing]
    seconds = time.perf_counter() - started
    print(
        f"\n{figures - len(wrong)} of {figures} figures equal in every digit, {seconds:.0f} s",
        file=sys.stderr,
    )
    for line in wrong:
        complain(f"differs (expected, obtained): {line}")
    for message in failed:
        print(f"mllm-jax score-all: not compared: {message}", file=sys.stderr)
    return 2 if failed else 1 if wrong else 0
