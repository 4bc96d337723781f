"""Report one or several evaluated runs, side by side, as one HTML page, Markdown and JSON.

    mllm-jax report runs/quickstart
    mllm-jax report runs/mlp2x_gelu runs/average_pool --out runs/comparison

Every run is a work directory (a folder or gs://) that train.py or eval.py evaluated. Of several, each is compared with
the first one (or the one of --baseline) on the questions that both were asked.
"""

import argparse

from mllm_jax.console import complain
from mllm_jax.storage import as_path

BUCKETS = ("", "out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directory of an evaluated run")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for the report (one run: RUN/eval; several: must be given)"
    )
    parser.add_argument("--groups", metavar="FILE", help="another grouping file (JSON) for the sub-tasks")
    parser.add_argument(
        "--baseline", metavar="NAME", help="the run that the others are compared with (the first one)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints where it is; 1 with a message if a run cannot be reported."""
    from mllm_jax.evaluation.report.runs import ReportError  # slow to import: matplotlib
    from mllm_jax.evaluation.report.write import write_report

    if args.out is None and len(args.runs) > 1:
        complain("mllm-jax report: several runs need --out DIR for their report")
        return 2
    out = as_path(args.out) if args.out else as_path(args.runs[0]) / "eval"
    try:
        page = write_report(args.runs, out, args.groups, args.baseline)
    except (ReportError, OSError) as error:
        complain(f"mllm-jax report: {error}")
        return 1
    print(page)
    return 0
