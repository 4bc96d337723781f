"""What the samples of a data set need of a row, kept on disk: packing needs all sizes before the first step."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console

from mllm_jax import files
from mllm_jax.console import make_console, progress_bar, say
from mllm_jax.data.packing import RESOURCES
from mllm_jax.data.rows import RowEncoder
from mllm_jax.data.samples import Source
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.worker_processes import worker_processes

CHUNK = 4096  # samples that are kept together when measuring is stopped


def sizes(
    source: Source,
    encoder: RowEncoder,
    folder: Path,
    threads: int,
    console: Console | None = None,
    workers: int = 1,
) -> Int[np.ndarray, "N 4"]:
    """int32, what each sample needs of each of `packing.RESOURCES`; read from `folder` if it was measured before.

    Measuring tokenizes every conversation, about half a millisecond each; no image is decoded unless its layout
    depends on its size. What decides the sizes names the file: the data, template, tokenizer and visual layout.

    Args:
      threads: of this process, with one worker.
      workers: processes.

    Raises:
      SampleError: a conversation that does not fit the template or the sample's images.
      DataError: a sample that cannot be read.
    """
    path = folder / f"{_key(source, encoder)}.int32"
    if (found := _read(path, len(source))) is not None:
        return found
    found = np.zeros((len(source), len(RESOURCES)), np.int32)
    parts = folder / f".{path.stem}"  # of a measuring that was stopped
    chunks = [range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK)]
    with progress_bar(console) as progress, contextlib.ExitStack() as stack:
        task = progress.add_task("measuring samples", total=len(source))

        def measured() -> Iterator[tuple[range, Int[np.ndarray, "n 4"]]]:
            left = []
            for chunk in chunks:
                if (part := _read(parts / str(chunk.start), len(chunk))) is None:
                    left.append(chunk)
                else:
                    yield chunk, part
            if workers > 1:
                processes = worker_processes(f"{__name__}:measure_chunk", workers, source, encoder)
                yield from map_in_order(stack.enter_context(processes), left, workers, ahead=2)
            else:
                for chunk in left:
                    needs = map_in_order(lambda i: encoder.needs(source[i]), chunk, max(1, threads))
                    yield chunk, np.array([need for _, need in needs], np.int32)

        for chunk, part in measured():
            found[chunk.start : chunk.stop] = part
            _keep(parts / str(chunk.start), part)
            progress.advance(task, len(chunk))
    if error := _keep(path, found):
        say(
            make_console(),
            f"sizes of samples cannot be kept in {folder} ({error}); the next run measures again",
        )
    shutil.rmtree(parts, ignore_errors=True)
    return found


def measure_chunk(source: Source, encoder: RowEncoder, numbers: range) -> Int[np.ndarray, "n 4"]:
    """What the samples with these numbers need."""
    return np.array([encoder.needs(source[index]) for index in numbers], np.int32)


def _read(path: Path, count: int) -> Int[np.ndarray, "n 4"] | None:
    if not path.is_file():
        return None
    data = path.read_bytes()
    if len(data) != 4 * count * len(RESOURCES):
        return None
    return np.frombuffer(data, "<i4").reshape(-1, len(RESOURCES))


def _keep(path: Path, found: Int[np.ndarray, "n 4"]) -> OSError | None:
    """Writes sizes; returns why they cannot be written: a folder that others share may be read-only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, found.astype("<i4").tobytes())
    except OSError as error:
        return error
    return None


def _key(source: Source, encoder: RowEncoder) -> str:
    tokenizer = getattr(encoder.tokenizer, "tokenizer", encoder.tokenizer)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    decides = (
        getattr(source, "fingerprint", repr(source)),
        encoder.template,
        encoder.visual_layout,
        encoder.read_image.compat,
        hashlib.sha256(words.encode()).hexdigest(),
    )
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:20]
