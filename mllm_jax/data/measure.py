"""What the samples of a data set need of a row, kept on disk: packing needs all sizes before the first step."""

import hashlib
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


def sizes(
    source: Source, encoder: RowEncoder, folder: Path, threads: int, console: Console | None = None
) -> Int[np.ndarray, "N 4"]:
    """int32, what each sample needs of each of `packing.RESOURCES`; read from `folder` if it was measured before.

    Measuring tokenizes every conversation, about half a millisecond each; no image is decoded unless its layout
    depends on its size. What decides the sizes names the file: the data, template, tokenizer and visual layout.

    Raises:
      SampleError: a conversation that does not fit the template or the sample's images.
      DataError: a sample that cannot be read.
    """
    path = folder / f"{_key(source, encoder)}.int32"
    if path.is_file():
        data = path.read_bytes()
        if len(data) == 4 * len(source) * len(RESOURCES):
            return np.frombuffer(data, "<i4").reshape(-1, len(RESOURCES))
    found = np.zeros((len(source), len(RESOURCES)), np.int32)
    with progress_bar(console) as progress:
        task = progress.add_task("measuring samples", total=len(source))
        measured = map_in_order(
            lambda index: encoder.needs(source[index]), range(len(source)), max(1, threads)
        )
        for index, needs in measured:
            found[index] = needs
            progress.advance(task)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, found.astype("<i4").tobytes())
    except OSError as error:  # a folder that others share may be read-only
        say(
            make_console(),
            f"sizes of samples cannot be kept in {folder} ({error}); the next run measures again",
        )
    return found


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
