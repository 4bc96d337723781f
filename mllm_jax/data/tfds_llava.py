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
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mllm_jax.data import llava_json
from mllm_jax.data.samples import Sample, read_image_file

FORMAT = 1  # raise when what is written changes, so that older preparations are not reused
SPLIT = "train"
SHARD_BYTES = 1 << 29  # images of one shard; ArrayRecord wants files of at least some hundred MB
WRITER_OPTIONS = "group_size:1,uncompressed"  # images are compressed already; one by one for random access


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
            raise llava_json.DataError(f"{directory}: no prepared data set here; make one with prepare()")
        self.fingerprint: str = metadata["fingerprint"]
        builder = tfds.builder_from_directory(self.directory)
        self._records = builder.as_data_source(SPLIT, decoders={"images": KeepEncoded()})
        if len(self._records) != metadata["samples"]:
            message = f"{directory}: holds {len(self._records)} samples instead of {metadata['samples']}; "
            raise llava_json.DataError(
                message + "files are missing: move the directory away and prepare again"
            )

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
      shard_bytes: a new file is begun after about so many bytes of images.
      show_progress: draw a progress bar.

    Returns:
      The data set, one sample per entry and in the same order.

    Raises:
      DataError: for anything wrong with the JSON and for a missing or unreadable image, naming the sample.

    In a run of several processes with a shared `data_dir`, let one process prepare and the others wait for
    it; a second one preparing at the same time does the work twice and ends with the same result.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"data set name {name!r}: use lower-case letters, digits and underscores")
    records = llava_json.read_records(json_path, image_root, duplicate_ids=duplicate_ids, compat=compat)
    pictured = next((record for record in records if record.images), None)
    if image_root is None and pictured is not None:
        message = f"{json_path}: sample {pictured.id!r} has an image but no image folder was given"
        raise llava_json.DataError(message)
    root = Path(image_root or ".")
    sizes, fingerprint = _fingerprint(Path(json_path), root, records, f"{duplicate_ids} {compat}")

    existing = find_version(Path(data_dir) / name, fingerprint)
    if existing is None:
        version = next_version(Path(data_dir) / name)
        metadata = {"fingerprint": fingerprint, "samples": len(records), "json": Path(json_path).name}
        with tfds.core.registered.skip_registration():  # a class per version: tfds keeps it on the class
            builder_class = type("_Builder", (LlavaJsonBuilder,), {"name": name, "VERSION": version})
        builder = builder_class(
            records=records,
            image_root=root,
            shards=_plan_shards(records, sizes, shard_bytes),
            metadata=metadata,
            show_progress=show_progress,
            data_dir=os.fspath(data_dir),
            file_format="array_record",
        )
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            builder.download_and_prepare(download_config=config)
        except OSError:
            if find_version(Path(data_dir) / name, fingerprint) is None:
                raise  # otherwise another process has finished the same version first
        existing = find_version(Path(data_dir) / name, fingerprint)
        if existing is None:
            where = f"{data_dir}/{name}/{version}"
            raise llava_json.DataError(f"{where} was written meanwhile from other data; prepare again")
    return LlavaSource(existing)


with tfds.core.registered.skip_registration():  # `tfds.load("name")` could not give it its arguments

    class LlavaJsonBuilder(tfds.core.GeneratorBasedBuilder):
        """Writes checked LLaVA records and their image files as one ArrayRecord split.

        The writing is done here, shard by shard, instead of by tfds's own writer: that one shuffles on disk,
        and its disk buffers, used from 1 GB on, need TensorFlow. Order is left to the training pipeline.
        """

        VERSION = tfds.core.Version("1.0.0")
        split_name = SPLIT

        def __init__(
            self,
            *,
            records: Sequence[Any],
            image_root: Path,
            shards: Sequence[int],
            metadata: dict[str, Any],
            show_progress: bool = True,
            **kwargs: Any,
        ):
            """Takes the records, the number of them in each shard, and what to note beside the data."""
            self._records = records
            self._image_root = image_root
            self._shards = shards
            self._metadata = metadata
            self._show_progress = show_progress
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "id": tfds.features.Text(),
                "images": tfds.features.Sequence(tfds.features.Image()),
                "image_paths": tfds.features.Sequence(tfds.features.Text()),
                "conversations": tfds.features.Text(),  # JSON: a list of {"from", "value"}
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Images and conversations about them, in the format of LLaVA's training data.",
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(self._metadata),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            return {self.split_name: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, record in enumerate(self._records):
                files = (read_image_file(self._image_root / image, record.id) for image in record.images)
                example = {
                    "id": record.id,
                    "images": [io.BytesIO(data) for data in files],
                    "image_paths": list(record.images),
                    "conversations": json.dumps(record.conversations, ensure_ascii=False),
                }
                yield index, example

        def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
            # Called by tfds with `data_path` set to a temporary directory that it renames on success.
            features = self.info.features
            serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
            template = tfds.core.ShardedFileTemplate(
                dataset_name=self.name,
                data_dir=self.data_path,
                split=self.split_name,
                filetype_suffix="array_record",
            )
            examples = self._split_generators(dl_manager)[self.split_name]
            num_bytes = 0
            with _progress_bar(self._show_progress) as progress:
                task = progress.add_task(f"preparing {self.name}", total=len(self._records))
                for shard, length in enumerate(self._shards):
                    path = os.fspath(
                        template.sharded_filepath(shard_index=shard, num_shards=len(self._shards))
                    )
                    writer = array_record_module.ArrayRecordWriter(path, WRITER_OPTIONS)
                    try:
                        for _ in range(length):
                            data = serializer.serialize_example(features.encode_example(next(examples)[1]))
                            writer.write(data)
                            num_bytes += len(data)
                            progress.advance(task)
                    finally:
                        writer.close()
                    sync_file(path)
            split = tfds.core.SplitInfo(
                name=self.split_name,
                shard_lengths=list(self._shards),
                num_bytes=num_bytes,
                filename_template=template,
            )
            self.info.set_splits(tfds.core.splits.SplitDict([split]))

        def _make_download_manager(self, download_dir: Any, download_config: Any) -> Any:
            return types.SimpleNamespace(downloaded_size=0)  # tfds's own would leave empty folders behind

        def _log_download_bytes(self) -> None:
            pass  # nothing is downloaded; the progress bar tells the rest

        def _log_download_done(self) -> None:
            pass


class KeepEncoded(tfds.decode.SkipDecoding):
    """Leaves the images of a sequence encoded (tfds's own class does so for single images only)."""

    def decode_batch_example_np(self, serialized: Any) -> Any:
        return serialized


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


def _plan_shards(records: Sequence[llava_json.Record], sizes: dict[str, int], shard_bytes: int) -> list[int]:
    """How many records each shard takes so that it holds about `shard_bytes` of images."""
    shards, filled = [0], 0
    for record in records:
        size = sum(sizes[image] for image in record.images)
        if shards[-1] and filled + size > shard_bytes:
            shards.append(0)
            filled = 0
        shards[-1] += 1
        filled += size
    return shards


def _versions(directory: Path) -> list[tuple[int, Path]]:
    found = [path for path in directory.glob("*.0.0") if re.fullmatch(r"\d+\.0\.0", path.name)]
    return sorted((int(path.name.split(".")[0]), path) for path in found)


def next_version(directory: Path) -> tfds.core.Version:
    return tfds.core.Version(f"{max((number for number, _ in _versions(directory)), default=0) + 1}.0.0")


def find_version(directory: Path, fingerprint: str) -> Path | None:
    """The newest complete version with this fingerprint."""
    for _, path in reversed(_versions(directory)):
        metadata = read_metadata(path)
        if metadata is not None and metadata["fingerprint"] == fingerprint:
            return path
    return None


def read_metadata(directory: Path) -> dict[str, Any] | None:
    """What `prepare` noted beside the data, or None if this is not a complete version of its making."""
    try:
        metadata = json.loads((directory / "metadata.json").read_text(encoding="utf-8"))
        complete = (directory / "dataset_info.json").is_file()
    except (OSError, ValueError):
        return None
    keys_present = isinstance(metadata, dict) and {"fingerprint", "samples"} <= metadata.keys()
    return metadata if complete and keys_present else None


def sync_file(path: str) -> None:
    """Forces a file to the disk, so that a version that appears complete also is after a power failure."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _progress_bar(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not show)
