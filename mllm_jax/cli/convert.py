"""Turn a known data set into LLaVA-format JSON plus an image folder, ready for training and evaluation.

    mllm-jax convert easy_vqa --source path/to/easy_vqa --out data/easy_vqa

writes data/easy_vqa/train.json, test.json and images/. How to bring data of your own: see the text at the top
of mllm_jax/data/convert.py.
"""

import argparse
import time

from mllm_jax.console import complain
from mllm_jax.data.convert import CONVERTERS, convert
from mllm_jax.data.reading import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mllm-jax convert`."""
    parser.add_argument("dataset", choices=sorted(CONVERTERS), help="which data set")
    parser.add_argument("--source", required=True, metavar="DIR", help="the folder that holds it")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--max-turns",
        type=int,
        metavar="N",
        help="questions per conversation at most (several per image become several samples)",
    )


def run(args: argparse.Namespace) -> int:
    """Converts; returns 1 with a message if the source is not as expected."""
    started = time.perf_counter()
    try:
        counts = convert(args.dataset, args.source, args.out, args.max_turns)
    except DataError as error:
        complain(f"mllm-jax convert: {error}")
        return 1
    numbers = ", ".join(f"{count} {what}" for what, count in counts.items())
    print(f"{args.out}: {numbers}; {time.perf_counter() - started:.1f} s")
    print(f"next: mllm-jax validate --json {args.out}/train.json --images {args.out}/images")
    return 0
