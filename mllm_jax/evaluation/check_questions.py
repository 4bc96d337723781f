"""Looks through a file of questions before a model is asked them, as `data.validate` does with training data."""

import collections
import os
from typing import Any

from mllm_jax.data.images import MAX_PIXELS, ImageError, decode_image
from mllm_jax.data.llava_json import Problem
from mllm_jax.data.reading import DataError
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.validate import Report
from mllm_jax.data.video import read_frames
from mllm_jax.evaluation.benchmarks import BenchmarkError, read_benchmark
from mllm_jax.evaluation.benchmarks.base import VIDEOS
from mllm_jax.storage import Path


def check_questions(
    name: str,
    path: str | Path,
    images: str | Path | None,
    *,
    compat: str | None = None,
    max_image_pixels: int = MAX_PIXELS,
    num_threads: int | None = None,
) -> Report:
    """Reads a benchmark's questions, all their images, and a frame of every video.

    Args:
      name: of the benchmark.
      path: its question file.
      images: the folder of its images; None for the default one.
      compat, max_image_pixels, num_threads: as in `data.validate.validate`.

    Returns:
      What was found: the first fault of the file, or every image that cannot be shown.
    """
    try:
        benchmark = read_benchmark(name, path, images)
    except BenchmarkError as error:
        problem = Problem("questions", "", str(error).removeprefix(f"{path}: "))
        empty = {"answers": 0, "images": 0, "text_only": 0, "several_images": 0}
        return Report(str(path), 0, 0, 0, (problem,), empty)
    users: dict[str, dict[str, None]] = collections.defaultdict(dict)
    videos: set[str] = set()
    shown: dict[str, int] = {}
    for question in benchmark.questions:
        which = str(question.row["question_id"])
        shown[which] = len(question.images)
        for image in question.images:
            users[image][which] = None
            if question.medium == VIDEOS:
                videos.add(image)

    def check(image: str) -> tuple[int, int] | str:
        try:
            if image in videos:
                (pixels,) = read_frames(
                    benchmark.video_file(image), 1, compat=compat, max_pixels=max_image_pixels
                )
                return pixels.shape[:2]
            data = benchmark.read_image(image)
            pixels = decode_image(
                data, source=str(benchmark.images / image), compat=compat, max_pixels=max_image_pixels
            )
        except (DataError, ImageError) as error:
            return str(error)
        return pixels.shape[:2]

    problems, sizes = [], []
    threads = min(16, os.cpu_count() or 1) if num_threads is None else num_threads
    for image, outcome in map_in_order(check, users, threads):
        if isinstance(outcome, str):
            problems += [Problem("unusable-image", which, outcome) for which in users[image]]
        else:
            sizes.append(outcome)
    stats: dict[str, Any] = {
        "answers": sum("answer" in question.row for question in benchmark.questions),
        "images": len(users),
        "text_only": sum(not count for count in shown.values()),
        "several_images": sum(count > 1 for count in shown.values()),
    }
    for key, values in zip(("heights", "widths"), zip(*sizes, strict=True), strict=bool(sizes)):
        stats[key] = [min(values), sorted(values)[len(values) // 2], max(values)]
    sound = len(shown.keys() - {problem.sample for problem in problems})
    return Report(str(path), len(shown), sound, 0, tuple(problems), stats)
