"""Draws a share of a training data set of the mini world; `dataset` starts one such process per core.

    python -m mllm_jax.mini.world.worker FOLDER SPLIT STAGE FRAMED SEED N FIRST STEP

Images go into FOLDER, records to standard output, one per line.
"""

import contextlib
import json
import pathlib
import sys

from mllm_jax.mini.world.dataset import draw_samples


def main(folder: str, split: str, stage: str, *numbers: str) -> None:
    """Draws samples FIRST, FIRST + STEP, ... below N."""
    framed, seed, n, first, step = map(int, numbers)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # who started this process says so
        for record in draw_samples(
            pathlib.Path(folder), split, stage, seed, range(first, n, step), bool(framed)
        ):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
