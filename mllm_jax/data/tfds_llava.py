"""A tensorflow-datasets builder for LLaVA-format data, written as ArrayRecord and read at random.

`prepare` copies the JSON and the encoded bytes of its images into a few large files that Grain can read in
any order, without opening hundreds of thousands of small files each epoch. Images keep their encoding (JPEG
stays JPEG). TensorFlow is not needed, neither to write nor to read::

    source = prepare("llava_v1_5_mix665k.json", "images", "prepared", name="mix665k")
    source[0].id, source[0].images[0][:4], source[0].conversations

Layout: `DATA_DIR/NAME/VERSION/`. A version holds a fingerprint of what it was made from (the JSON's bytes,
the images' paths, sizes and modification times, the options). Same fingerprint: reused. Any other: written
under the next version number, the old one stays. A version directory appears only once it is complete.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from mllm_jax.console import progress_bar
from mllm_jax.data import llava_json
from mllm_jax.data.images import decode_image
from mllm_jax.data.reading import DataError, read_image_file
from mllm_jax.data.samples import Sample
from mllm_jax.data.tfds_versions import (
    SHARD_BYTES,
    KeepEncoded,
    VersionBuilder,
    find_version,
    plan_shards,
    read_metadata,
    write_version,
)
from mllm_jax.data.threads import map_in_order

FORMAT = 1  # raise when what is written changes, so that older preparations are not reused
SPLIT = "train"


class LlavaSource:
    """A prepared data set: `len(source)` samples in the JSON's order, `source[i]` is a `Sample`.

    Safe to read from several threads and to send to worker processes.
    """

    def __init__(self, directory: str | Path):
        """Opens a prepared version directory (`DATA_DIR/NAME/VERSION`), without looking at its sources.

        Raises:
          DataError: if the directory holds no complete preparation.
        """
        self.directory = Path(directory)
        metadata = read_metadata(self.directory)
        if metadata is None:
            raise DataError(f"{directory}: no prepared data set here; make one with prepare()")
        self.fingerprint: str = metadata["fingerprint"]
        builder = tfds.builder_from_directory(self.directory)
        self._records = builder.as_data_source(SPLIT, decoders={"images": KeepEncoded()})
        if len(self._records) != metadata["samples"]:
            message = f"{directory}: holds {len(self._records)} samples instead of {metadata['samples']}; "
            raise DataError(message + "files are missing: move the directory away and prepare again")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        fields = self._records[index]
        return Sample(
            id=fields["id"].decode(),
            images=tuple(fields["images"]),
            image_paths=tuple(path.decode() for path in fields["image_paths"]),
            conversations=tuple(json.loads(fields["conversations"])),
        )

    def __repr__(self) -> str:
        return f"LlavaSource({str(self.directory)!r}, samples={len(self)})"


def prepare(
    json_path: str | Path,
    image_root: str | Path | None,
    data_dir: str | Path,
    *,
    name: str = "llava",
    duplicate_ids: llava_json.DuplicateIds = "error",
    compat: str | None = None,
    max_image_pixels: int | None = None,
    check: Callable[[llava_json.Record], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    show_progress: bool = True,
) -> LlavaSource:
    """Writes a LLaVA-format data set as ArrayRecord, or reuses what was written from the same files before.

    Args:
      json_path: LLaVA-format `.json` or `.jsonl` file.
      image_root: the folder its image paths start from; None for a text-only data set.
      data_dir: where prepared data sets live.
      name: the data set's name below `data_dir`: lower-case letters, digits and underscores.
      duplicate_ids, compat: as in `llava_json.read_records`.
      max_image_pixels: every image is decoded before anything is written, and one with more pixels refused; None
        leaves images unread until they are used.
      check: called with every record, to raise what makes it unusable.
      shard_bytes: a new file is begun after about so many bytes of images.
      show_progress: draw a progress bar.

    Returns:
      The data set, one sample per entry and in the same order.

    Raises:
      DataError: for anything wrong with the JSON and for a missing or unreadable image, naming the sample.
      ImageError: for an image that cannot be decoded or has too many pixels, naming the sample.

    In a run of several processes with a shared `data_dir`, let one process prepare and the others wait for
    it; a second one preparing at the same time does the work twice and ends with the same result.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"data set name {name!r}: use lower-case letters, digits and underscores")
    records = llava_json.read_records(json_path, image_root, duplicate_ids=duplicate_ids, compat=compat)
    if check is not None:
        _checked("checking conversations", map(check, records), len(records), show_progress)
    pictured = next((record for record in records if record.images), None)
    if image_root is None and pictured is not None:
        message = f"{json_path}: sample {pictured.id!r} has an image but no image folder was given"
        raise DataError(message)
    root = Path(image_root or ".")
    # What is read without a repeated id is the same either way, and data with one is never prepared under "error".
    sizes, fingerprint = _fingerprint(Path(json_path), root, records, f"error {compat}")

    existing = find_version(Path(data_dir) / name, fingerprint)
    if existing is None:
        if max_image_pixels is not None:
            _check_images(records, root, compat, max_image_pixels, show_progress)
        existing = write_version(
            LlavaJsonBuilder,
            data_dir,
            name,
            fingerprint,
            records=records,
            image_root=root,
            shards=plan_shards((sum(sizes[image] for image in one.images) for one in records), shard_bytes),
            metadata={"fingerprint": fingerprint, "samples": len(records), "json": Path(json_path).name},
            show_progress=show_progress,
        )
    return LlavaSource(existing)


with tfds.core.registered.skip_registration():

    class LlavaJsonBuilder(VersionBuilder):
        """Writes checked LLaVA records and their image files as one ArrayRecord split."""

        split_name = SPLIT

        def __init__(self, *, image_root: Path, **kwargs: Any):
            """Takes, beside what `VersionBuilder` takes, the folder that image paths start from."""
            self._image_root = image_root
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "id": tfds.features.Text(),
                "images": tfds.features.Sequence(tfds.features.Image()),
                "image_paths": tfds.features.Sequence(tfds.features.Text()),
                "conversations": tfds.features.Text(),  # JSON: a list of {"from", "value"}
            }
            return self._dataset_info(
                "Images and conversations about them, in the format of LLaVA's training data.", features
            )

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, record in enumerate(self._records):
                files = (read_image_file(self._image_root, image, record.id) for image in record.images)
                example = {
                    "id": record.id,
                    "images": [io.BytesIO(data) for data in files],
                    "image_paths": list(record.images),
                    "conversations": json.dumps(record.conversations, ensure_ascii=False),
                }
                yield index, example


def _check_images(
    records: Sequence[llava_json.Record], root: Path, compat: str | None, max_pixels: int, show_progress: bool
) -> None:
    """Decodes every image once: a broken one is found now and not in the middle of training."""
    users: dict[str, str] = {}  # image -> first sample that shows it
    for record in records:
        for image in record.images:
            users.setdefault(image, record.id)

    def check(image: str) -> None:
        data = read_image_file(root, image, users[image])
        source = f"sample {users[image]!r}, {root / image}"
        decode_image(data, source=source, compat=compat, max_pixels=max_pixels)

    checks = map_in_order(check, users, min(16, os.cpu_count() or 1))
    _checked("checking images", checks, len(users), show_progress)


def _checked(what: str, checks: Iterable[Any], total: int, show_progress: bool) -> None:
    with progress_bar(show=show_progress) as progress:
        task = progress.add_task(what, total=total)
        for _ in checks:
            progress.advance(task)


def _fingerprint(
    json_path: Path, root: Path, records: Sequence[llava_json.Record], options: str
) -> tuple[dict[str, int], str]:
    """Sizes of the image files in bytes, and a hash of everything the preparation is made from."""
    digest = hashlib.sha256(f"{FORMAT} {options}\n".encode())
    digest.update(hashlib.sha256(json_path.read_bytes()).digest())
    sizes: dict[str, int] = {}
    for record in records:
        for image in record.images:
            if image not in sizes:
                status = (root / image).stat()
                sizes[image] = status.st_size
                digest.update(f"{image}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return sizes, digest.hexdigest()
