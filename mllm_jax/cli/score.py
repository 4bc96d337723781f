"""Score a file of answers exactly like the benchmark's official script, offline.

    mllm-jax score pope --predictions answers.jsonl --annotations data/pope
    mllm-jax score mmbench --predictions answers.jsonl --annotations mmbench_dev_20230712.tsv
    mllm-jax score --list

Prints one JSON object: benchmark, n, unparsed, score, subtasks, groups and the benchmark's further figures.
Missing, repeated and unknown question ids, empty answers, wrong encodings and half-written lines are counted
under `problems`. If a question has no answer, or two different ones, `score` is null and what was
computed from the answered questions is under `partial`.

The exit code is 0 for a complete score, 1 for an incomplete one and 2 if the files cannot be scored.
"""

import argparse
import json
import sys
from typing import Any

from mllm_jax.console import complain
from mllm_jax.evaluation.benchmarks import BENCHMARKS, get_benchmark
from mllm_jax.storage import as_path

BUCKETS = ("predictions", "annotations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax score`."""
    parser.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="exact name, see --list")
    parser.add_argument("--predictions", metavar="P", help="the answer file (or folder)")
    parser.add_argument("--annotations", metavar="A", help="the benchmark's annotations (file or folder)")
    parser.add_argument("--groups", metavar="FILE", help="another grouping file (JSON) for the sub-tasks")
    parser.add_argument("--tokenizer", help="captions: auto (default), java, python or none")
    parser.add_argument(
        "--answered-only",
        action="store_true",
        help="score the answered questions of an incomplete file; the result says so",
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks and their file formats")


def _list() -> None:
    for name, benchmark in sorted(BENCHMARKS.items()):
        if not benchmark.not_scored:
            print(f"{name}  (score: {benchmark.unit}; rule: {benchmark.rule})")
            print(f"    predictions: {benchmark.answers_format}")
            print(f"    annotations: {benchmark.annotations_format or 'optional or inside the predictions'}")


def answered_only(result: dict[str, Any]) -> dict[str, Any]:
    """An incomplete result with the figures of its answered questions on top; `complete` stays false."""
    if result["complete"]:
        return result
    partial = dict(result["partial"])
    note = {"note": partial.pop("note"), "answered_questions_only": partial.pop("answered")}
    rest = {key: value for key, value in result.items() if key != "partial"}
    return rest | partial | note


def _printable(result: dict[str, Any]) -> str:
    """JSON in its own characters, or escaped where the terminal cannot show them or no encoding can."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(result, indent=1)
    return text


def run(args: argparse.Namespace) -> int:
    """Prints the score; see the module's text for the exit code."""
    if args.list:
        _list()
        return 0
    options = {key: getattr(args, key) for key in ("groups", "tokenizer") if getattr(args, key) is not None}
    if "groups" in options:
        options["groups"] = as_path(options["groups"])
    try:
        if not args.benchmark or not args.predictions:
            raise ValueError(
                "give a BENCHMARK and --predictions (mllm-jax score --list shows the benchmarks)"
            )
        annotations = None if args.annotations is None else as_path(args.annotations)
        result = get_benchmark(args.benchmark).score(as_path(args.predictions), annotations, **options)
    except (ValueError, OSError, RuntimeError) as error:
        complain(f"mllm-jax score: {error}")
        return 2
    print(_printable(answered_only(result) if args.answered_only else result))
    if not result["complete"]:
        found = {kind: entry["count"] for kind, entry in result["problems"].items()}
        complain(f"mllm-jax score: incomplete, no score is given: {found}")
        return 1
    return 0
