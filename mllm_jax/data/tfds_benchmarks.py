"""tensorflow-datasets builders for benchmarks, written as ArrayRecord from files that the user has downloaded.

One parametrised builder for all of them: a record holds the images of one or more questions, encoded as they were,
and the questions. Nothing is downloaded: the files lie in the benchmark's manual folder (docs/benchmarks.md says
which). A `SHA256SUMS` file there, as `sha256sum` writes it, is checked before anything is written; the digests of the
question files are noted beside the data in any case. TensorFlow is not needed.

Layout: `DATA_DIR/NAME/VERSION/`, as in `tfds_versions`, with `prompts.json` beside the shards: the questions again, so
that they are known without reading the images.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mllm_jax import files
from mllm_jax.data.images import decode_image
from mllm_jax.data.reading import DataError, read_json, read_text, safe_path
from mllm_jax.data.source_digest import THREADS
from mllm_jax.data.tfds_versions import (
    SHARD_BYTES,
    Features,
    Records,
    VersionBuilder,
    complete_versions,
    find_version,
    plan_shards,
    read_metadata,
    write_version,
)
from mllm_jax.data.threads import map_in_order

FORMAT = 1  # raise when what is written changes
SPLIT = "test"
PROMPTS = "prompts.json"
CHECKSUMS = "SHA256SUMS"
_CHUNK = 1 << 22


def benchmark_features() -> Features:
    """The features of a record."""
    return {
        "images": tfds.features.Sequence(tfds.features.Image()),
        "image_names": tfds.features.Sequence(tfds.features.Text()),
        "prompts": tfds.features.Text(),  # JSON: a list of objects
    }


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Questions about the same images.

    Attributes:
      images: names of the images, in the order in which they are shown.
      prompts: JSON-able objects, in order.
    """

    images: tuple[str, ...]
    prompts: tuple[dict[str, Any], ...]


class BenchmarkSource:
    """A prepared benchmark; safe to read from several threads.

    Attributes:
      directory: `DATA_DIR/NAME/VERSION`.
      metadata: what was noted: `kind`, `options`, `fingerprint`, `samples` and `files` (path below the manual folder ->
        SHA-256).
      sets: images' names and questions.
    """

    def __init__(self, directory: str | Path):
        """Opens a version directory, without looking at the files that it was made from.

        Raises:
          DataError: it holds no complete preparation.
        """
        self.directory = Path(directory)
        self.metadata = read_metadata(self.directory) or {}
        if not is_prepared(self.directory) or "kind" not in self.metadata:
            raise DataError(f"{directory}: no prepared benchmark here; make one with prepare_benchmark()")
        self.sets = _read_sets(self.directory / PROMPTS)
        self._records = Records(self.directory, SPLIT, benchmark_features)
        counts = {len(self._records), len(self.sets), self.metadata["samples"]}
        if len(counts) > 1:
            raise DataError(
                f"{directory}: {len(self._records)} records with images, {len(self.sets)} with questions, "
                f"{self.metadata['samples']} were written; move the directory away and prepare again"
            )
        self._place = {
            name: (record, index)
            for record, one in enumerate(self.sets)
            for index, name in enumerate(one.images)
        }

    def __contains__(self, name: object) -> bool:
        return name in self._place

    def image(self, name: str) -> bytes:
        """The encoded image of that name."""
        record, index = self._place[name]
        return self._records[record]["images"][index]

    def __repr__(self) -> str:
        return f"BenchmarkSource({str(self.directory)!r}, records={len(self.sets)})"


def _read_sets(path: Path) -> list[ImageSet]:
    sets = []
    for one in rows if isinstance(rows := read_json(path), list) else [None]:
        match one:
            case [list(images), list(prompts)] if all(isinstance(x, str) for x in images) and all(
                isinstance(x, dict) for x in prompts
            ):
                sets.append(ImageSet(tuple(images), tuple(prompts)))
            case _:
                raise DataError(
                    f"{path}: no questions of a prepared benchmark; move the folder away, prepare again"
                )
    return sets


def is_prepared(directory: Path) -> bool:
    """Whether a directory is a version of a prepared benchmark."""
    return (directory / PROMPTS).is_file() and (directory / "dataset_info.json").is_file()


def prepare_benchmark(
    kind: str,
    sets: Sequence[ImageSet],
    read_image: Callable[[str], bytes],
    data_dir: str | Path,
    *,
    files: Sequence[Path],
    manual_dir: Path,
    stamp: str,
    content: Callable[[], str],
    options: dict[str, Any],
    instructions: str = "",
    shard_bytes: int = SHARD_BYTES,
    show_progress: bool = True,
) -> BenchmarkSource:
    """Writes a benchmark as ArrayRecord, or reuses what was written from the same files before.

    Args:
      kind: the benchmark's name; its directory is the same with other characters than letters and digits as `_`.
      sets: questions by their images.
      read_image: name -> encoded image.
      data_dir: where prepared data sets live.
      files: the question and annotation files, whose digests are noted.
      manual_dir: the folder with the downloaded files, where `SHA256SUMS` is looked for.
      stamp: stays the same while no file is touched.
      content: makes a digest of what is read from them; called where the stamp is not known.
      options: how the benchmark was read.
      instructions: what to download, for tfds.
      shard_bytes: a new file is begun after about so many bytes of images.
      show_progress: draw a progress bar.

    Raises:
      DataError: a file differs from `SHA256SUMS`, or an image cannot be read.
      ImageError: a file that is no image: nothing else is copied.
    """
    name = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    # "refcoco+" is not "refcoco".
    name += "_plus" if "+" in kind else ""
    stamp = hashlib.sha256(f"{FORMAT} {kind} {stamp}".encode()).hexdigest()
    root = Path(data_dir) / name
    for path, noted in complete_versions(root):
        if stamp in (
            noted["fingerprint"],
            noted.get("stamp"),
        ):  # the first in versions from before contents were noted
            return BenchmarkSource(path)
    fingerprint = hashlib.sha256(f"{FORMAT} {kind} {content()}".encode()).hexdigest()
    if (existing := find_version(root, fingerprint)) is not None:
        return BenchmarkSource(existing)
    verify_checksums(manual_dir)
    metadata = {
        "fingerprint": fingerprint,
        "stamp": stamp,
        "samples": len(sets),
        "kind": kind,
        "options": options,
        "files": {os.path.relpath(path, manual_dir): file_digest(path) for path in files},
    }

    def size(one: ImageSet) -> int:
        """Bytes of its images, all of which are looked at: no other file is to be handed on in their place."""
        images = [(name, read_image(name)) for name in one.images]
        for name, data in images:
            decode_image(data, source=f"{kind}: {name}")
        return sum(len(data) for _, data in images)

    sizes = (found for _, found in map_in_order(size, sets, THREADS))
    existing = write_version(
        BenchmarkBuilder,
        data_dir,
        name,
        fingerprint,
        instructions=instructions,
        records=sets,
        read_image=read_image,
        shards=plan_shards(sizes, shard_bytes),
        metadata=metadata,
        show_progress=show_progress,
    )
    return BenchmarkSource(existing)


with tfds.core.registered.skip_registration():

    class BenchmarkBuilder(VersionBuilder):
        """Writes `ImageSet`s as one ArrayRecord split, and their questions beside it."""

        split_name = SPLIT
        features = staticmethod(benchmark_features)

        def __init__(self, *, read_image: Callable[[str], bytes], **kwargs: Any):
            """Takes, beside what `VersionBuilder` takes, how images are read."""
            self._read_image = read_image
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            return self._dataset_info(
                "Images and the questions that a benchmark asks about them, with its prompts."
            )

        def _example(self, record: ImageSet) -> dict[str, Any]:
            return {
                "images": [io.BytesIO(self._read_image(name)) for name in record.images],
                "image_names": list(record.images),
                "prompts": json.dumps(record.prompts, ensure_ascii=False),
            }

        def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
            super()._download_and_prepare(dl_manager, download_config)
            sets = [[one.images, one.prompts] for one in self._records]
            files.write_text(os.path.join(self.data_path, PROMPTS), json.dumps(sets, ensure_ascii=False))


def verify_checksums(folder: Path) -> None:
    """Compares files with the folder's `SHA256SUMS`, if it has one.

    Raises:
      DataError: a line that is none, or a file that is missing or differs; names it.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"([0-9a-fA-F]{64})[ \t]+[*]?(.+)", line.strip())
        if found is None:
            raise DataError(f"{path} line {number}: expected a SHA-256 digest and a file name")
        file = safe_path(folder, found[2])
        if not file.is_file():
            raise DataError(f"{file} is missing, but {path} lists it")
        if (digest := file_digest(file)) != found[1].lower():
            raise DataError(
                f"{file} has the SHA-256 digest {digest}, not {found[1]} of {path}; download it again"
            )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
