"""Benchmarks as tensorflow-datasets data: prepared from the official files once, then read from ArrayRecord."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks import BenchmarkError, Published, get_asked
from mllm_jax.evaluation.benchmarks.base import VIDEOS, Question

_FIELDS = ("row", "prompt", "options", "interleaved")


def prepare(
    name: str,
    path: str | Path,
    data_dir: str | Path,
    images: str | Path | None = None,
    *,
    shard_bytes: int | None = None,
    show_progress: bool = True,
    **options: bool | str,
) -> Published:
    """The benchmark, read from `DATA_DIR/NAME/VERSION`, which is written first unless it is there from the same files.

    Args:
      name, path, images, **options: as in `read_benchmark`; of published benchmarks.
      data_dir: where prepared data sets live.
      shard_bytes: see `tfds_benchmarks.prepare_benchmark`.
      show_progress: draw a progress bar.

    Raises:
      BenchmarkError: files that are missing or cannot be used.
      DataError: a file that is not the one that the folder's `SHA256SUMS` lists, or an image that cannot be read.
    """
    # tensorflow-datasets takes seconds to import; only this way of reading needs it.
    from mllm_jax.data import tfds_benchmarks

    published = get_asked(name)
    if not issubclass(published, Published):
        raise BenchmarkError(f"{name!r} is read from your own file; there is nothing to prepare")
    benchmark = published(path, images, **options)
    if any(question.medium == VIDEOS for question in benchmark.questions):
        raise BenchmarkError(f"{name}: prepared data hold images; ask about videos without --prepared")
    sets = []
    groups = itertools.groupby(enumerate(benchmark.questions), lambda pair: pair[1].images or pair[0])
    for _, group in groups:
        questions = [question for _, question in group]
        sets.append(tfds_benchmarks.ImageSet(questions[0].images, tuple(map(_as_json, questions))))
    given = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    chosen = {name: v for name, v in benchmark.values.items() if name not in benchmark.decoding_options()}
    source = tfds_benchmarks.prepare_benchmark(
        name,
        sets,
        benchmark.read_image,
        data_dir,
        files=benchmark.files_read,
        manual_dir=benchmark.folder,
        stamp=_stamp(benchmark, chosen),
        content=lambda: _content(benchmark, chosen),
        options=chosen,
        instructions=instructions(benchmark),
        show_progress=show_progress,
        **given,
    )
    return published.from_source(
        source, **{name: value for name, value in benchmark.values.items() if name not in chosen}
    )


def instructions(benchmark: Published | type[Published]) -> str:
    """What to download, one file per line."""
    lines = [f"{' or '.join(file.names)}: from {file.where}" for file in benchmark.files.values()]
    return f"Put these files into one folder for {benchmark.name}:\n" + "\n".join(lines)


def _as_json(question: Question) -> dict[str, Any]:
    return {name: getattr(question, name) for name in _FIELDS}


def _content(benchmark: Published, options: dict[str, bool | str]) -> str:
    """A digest of prompts, answers, options (but for those of decoding) and images, wherever their files lie."""
    digest = hashlib.sha256(f"{benchmark.fingerprint} {json.dumps(options, sort_keys=True)}".encode())
    images = dict.fromkeys(name for question in benchmark.questions for name in question.images)
    for name in images:
        digest.update(f"{name}\0{hashlib.sha256(benchmark.read_image(name)).hexdigest()}\n".encode())
    return digest.hexdigest()


def _stamp(benchmark: Published, options: dict[str, bool | str]) -> str:
    """The same with sizes and times of all files in place of their contents: unchanged while no file is touched."""
    digest = hashlib.sha256(f"{benchmark.fingerprint} {json.dumps(options, sort_keys=True)}".encode())
    beside = [
        p
        for question in benchmark.questions
        for name in question.images
        if (p := benchmark.image_file(name)) is not None
    ]
    for path in dict.fromkeys([*benchmark.files_read, *beside]):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
