"""The table of benchmarks that a model can be asked: exact kind -> runner. A new one is one file and one row here."""

import difflib
from pathlib import Path

from mllm_jax.evaluation.runners.base import MAIN, OPEN, Ask, BenchmarkError, Runner, key_of
from mllm_jax.evaluation.runners.caption import CaptionRunner
from mllm_jax.evaluation.runners.mini import MiniRunner
from mllm_jax.evaluation.runners.vqa import VqaRunner

RUNNERS: dict[str, type[Runner]] = {"caption": CaptionRunner, "mini": MiniRunner, "vqa": VqaRunner}


def read_benchmark(kind: str, path: str | Path, images: str | Path | None = None) -> Runner:
    """Reads a benchmark's files.

    Args:
      kind: exact name in `RUNNERS`.
      path: its JSON file.
      images: folder that image names are relative to; None or "" for `images` beside the file.

    Raises:
      BenchmarkError: an unknown kind (the nearest is named) or files that cannot be used.
    """
    if kind not in RUNNERS:
        near = difflib.get_close_matches(str(kind), RUNNERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise BenchmarkError(f"unknown kind of benchmark {kind!r}; {hint}valid: {', '.join(RUNNERS)}")
    if not path:
        raise BenchmarkError(f"the {kind!r} benchmark needs the path of its JSON file")
    return RUNNERS[kind](path, images)


__all__ = ["MAIN", "OPEN", "RUNNERS", "Ask", "BenchmarkError", "Runner", "key_of", "read_benchmark"]
