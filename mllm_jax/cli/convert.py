"""Turn a data set into LLaVA-format samples plus an image folder, ready for `validate`, `prepare` and `train`.

    mllm-jax convert --source LLaVA-OneVision-Data/ai2d --out data/ai2d
    mllm-jax convert --source shards/ --files 'train-*.tar' --out data/captions --workers 8
    mllm-jax convert --source sharegpt4v.json --images images --out data/sharegpt4v
    mllm-jax convert --source vqa.parquet --columns question=prompt answer=reply --out data/vqa
    mllm-jax convert easy_vqa --source path/to/easy_vqa --out data/easy_vqa

Parquet files, WebDataset tars (also .tar.gz) and JSON files are read as a stream; what their columns, members or keys
mean is recognized and said. train.jsonl, images/ and report.json are written: the report, which is also printed, counts
what was left out or changed, and why. The same command continues a conversion that was stopped. With the name of one of
three public data sets, train.json, test.json and images/ are written from the files that they come as.
"""

import argparse
import os
import shlex
import time
from collections.abc import Collection

from rich.console import Console

from mllm_jax.console import complain, make_console, print_table, progress_bar, say
from mllm_jax.data.convert import CONVERTERS, convert
from mllm_jax.data.foreign.conversion import IMAGES, REPORT, SAMPLES, Converted, convert_files
from mllm_jax.data.foreign.drafts import Style
from mllm_jax.data.foreign.layouts import FIELDS, NEEDS, Layout
from mllm_jax.data.foreign.report import CHANGED, DROPPED, Tally
from mllm_jax.data.foreign.sources import Files, total_rows
from mllm_jax.data.images import MAX_PIXELS
from mllm_jax.data.reading import DataError

_SHOWN = 3  # samples of a kind that are named on the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax convert`."""
    style = Style()
    parser.add_argument(
        "dataset", nargs="?", choices=sorted(CONVERTERS), help="a public data set; leave out for other files"
    )
    parser.add_argument(
        "--source", required=True, metavar="PATH", help="a file, or the folder that holds them"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--max-turns",
        type=int,
        metavar="N",
        help="easy_vqa: questions per conversation at most (several per image become several samples)",
    )
    files = parser.add_argument_group("Parquet, WebDataset and JSON files")
    files.add_argument("--layout", choices=NEEDS, help="what the columns are (default: recognized)")
    files.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"columns of other names, for the fields {', '.join(FIELDS)}",
    )
    files.add_argument(
        "--images", metavar="DIR", help="where image paths start from (default: the source's folder)"
    )
    files.add_argument(
        "--files", metavar="PATTERN", help="read only files of such a name, for example 'train-*'"
    )
    files.add_argument(
        "--closing", default=style.closing, metavar="TEXT", help="a last line for vqa questions"
    )
    files.add_argument(
        "--caption-prompt", default=style.caption_prompt, metavar="TEXT", help="the question of captions"
    )
    files.add_argument("--system", choices=("keep", "drop"), default=style.system, help="system texts")
    files.add_argument(
        "--html",
        choices=("keep", "unescape"),
        default=style.html,
        help="escapes such as &amp; (default: keep)",
    )
    files.add_argument("--max-image-pixels", type=int, default=MAX_PIXELS, metavar="P")
    files.add_argument(
        "--strict", action="store_true", help="stop at the first sample that would be left out"
    )
    files.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (default: one per core)",
    )


def run(args: argparse.Namespace) -> int:
    """Converts; returns 1 with a message if the source is not as expected, 2 for options that do not go together."""
    started = time.perf_counter()
    if args.dataset is None and args.max_turns is not None:
        complain("mllm-jax convert: --max-turns needs the name of a public data set")
        return 2
    try:
        if args.dataset is None:
            return _convert_files(args)
        counts = convert(args.dataset, args.source, args.out, args.max_turns)
    except (DataError, OSError) as error:
        complain(f"mllm-jax convert: {error}")
        return 1
    numbers = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{args.out}: {numbers}; {time.perf_counter() - started:.1f} s")
    print(f"next: mllm-jax validate --json {args.out}/train.json --images {args.out}/images")
    return 0


def _convert_files(args: argparse.Namespace) -> int:
    started, console = time.perf_counter(), make_console()
    columns = {}
    for pair in args.columns:
        field, equals, column = pair.partition("=")
        if not (field and equals and column):
            complain(f"mllm-jax convert: --columns {pair}: write FIELD=COLUMN")
            return 2
        columns[field] = column
    with progress_bar(console, transient=True) as bar:

        def recognized(files: Files, layout: Layout, columns: Collection[str]) -> None:
            many = f"{len(files.paths)} files" if len(files.paths) > 1 else "1 file"
            read = "; ".join(
                f"{field} from {' or '.join(there)}"
                for field in layout.used
                if (there := [repr(column) for column in layout.fields[field] if column in columns])
            )
            say(console, f"{args.source}: {files.kind}, {many}; layout {layout.name!r}: {read}")
            bar.add_task("converting entries", total=total_rows(files))

        converted = convert_files(
            args.source,
            args.out,
            layout=args.layout,
            columns=columns,
            images=args.images,
            pattern=args.files,
            style=Style(args.closing, args.caption_prompt, args.system, args.html),
            max_image_pixels=args.max_image_pixels,
            strict=args.strict,
            workers=max(1, args.workers),
            recognized=recognized,
            progress=lambda count: bar.advance(bar.task_ids[0], count),
        )
    _show(converted, args.out, console, time.perf_counter() - started)
    return 0


def _show(converted: Converted, out: str, console: Console, seconds: float) -> None:
    report = converted.report
    left_out = sum(tally.count for tally in report.dropped.values())
    say(
        console,
        f"{out}/{SAMPLES}: {report.written:,} samples with {report.images:,} images from {report.read:,} entries, "
        f"{left_out:,} entries left out; {seconds:.1f} s",
    )
    for title, found, rules in (("left out", report.dropped, DROPPED), ("changed", report.changed, CHANGED)):
        rows = [
            (kind, f"{tally.count:,}", rules[kind], _first(tally), tally.example)
            for kind, tally in sorted(found.items(), key=lambda item: -item[1].count)
        ]
        if rows:
            wide = 5 if title == "left out" else 4
            head = ("kind", "samples", "rule", "first", "of the first")
            print_table(console, head[:wide], [row[:wide] for row in rows], title, text_columns=wide)
    if report.unread:
        names = ", ".join(f"{name} ({tally.count:,})" for name, tally in report.unread.items())
        say(console, f"not read: {names}")
    say(console, f"all of this is in {out}/{REPORT}")
    paths = [shlex.quote(f"{out}/{name}") for name in (SAMPLES, IMAGES)]
    say(console, f"next: mllm-jax validate --json {paths[0]} --images {paths[1]}")


def _first(tally: Tally) -> str:
    return ", ".join(tally.first[:_SHOWN]) + (", ..." if tally.count > _SHOWN else "")
