"""Versions of a data set as tensorflow-datasets writes them: ArrayRecord shards, read at random, without TensorFlow.

Layout: `DATA_DIR/NAME/VERSION/`. A version holds a fingerprint of what it was made from. Same fingerprint: reused.
Any other: written under the next version number, the old one stays. A version directory appears only once it is
complete; the shards that are, wait for it in `UNFINISHED`, so that a preparation that was stopped goes on. What is
written is up to a subclass of `VersionBuilder`: `tfds_llava`, `tfds_benchmarks`.

Any tensorflow-datasets program can read what is written. Here the shards are read with features that the code knows:
`tfds.builder_from_directory` would import whatever classes the folder's `features.json` names, and prepared data may
come from strangers.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import os
import re
import secrets
import shutil
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_data_source, array_record_module

from mllm_jax.console import progress_bar
from mllm_jax.data.reading import DataError, read_json
from mllm_jax.data.record_files import RecordFile
from mllm_jax.data.threads import map_in_order

SHARD_BYTES = 1 << 29  # images of one shard; ArrayRecord wants files of at least some hundred MB
UNFINISHED = ".unfinished"  # folder beside the versions
WRITER_OPTIONS = "group_size:1,uncompressed"  # images are compressed already; one by one for random access


Features = Mapping[str, Any]


class _DatasetInfo(tfds.core.DatasetInfo):
    """Without a question to the public data sets' server, which leaves an empty temporary folder behind."""

    def initialize_from_bucket(self) -> None:
        pass


with tfds.core.registered.skip_registration():  # `tfds.load("name")` could not give it its arguments

    class VersionBuilder(tfds.core.GeneratorBasedBuilder):
        """Writes records as one ArrayRecord split; a subclass has `_info` and `_example`.

        The writing is done here, shard by shard, instead of by tfds's own writer: that one shuffles on disk,
        and its disk buffers, used from 1 GB on, need TensorFlow. Order is left to the training pipeline.
        """

        VERSION = tfds.core.Version("1.0.0")
        split_name: str
        features: Callable[[], Features]

        def __init__(
            self,
            *,
            records: Sequence[Any],
            shards: Sequence[int],
            metadata: dict[str, Any],
            show_progress: bool = True,
            **kwargs: Any,
        ):
            """Takes the records, the number of them in each shard, and what to note beside the data."""
            self._records = records
            self._shards = shards
            self._metadata = metadata
            self._show_progress = show_progress
            super().__init__(**kwargs)

        def _dataset_info(self, description: str) -> tfds.core.DatasetInfo:
            return _DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(type(self).features()),
                metadata=tfds.core.MetadataDict(self._metadata),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
            return {self.split_name: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            return enumerate(map(self._example, self._records))

        def _example(self, record: Any) -> dict[str, Any]:
            """A record's fields, as `features` describes them."""
            raise NotImplementedError

        @contextlib.contextmanager
        def _writers(self) -> Iterator[tuple[Callable[[tuple[Path, Sequence[Any]]], int], int]]:
            """A function that writes a shard from (path, records), see `write_shard`, and how many may run at once."""

            def write(task: tuple[Path, Sequence[Any]]) -> int:
                path, records = task
                return write_shard(path, type(self).features, map(self._example, records))

            yield write, 1

        def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
            # Called by tfds with `data_path` set to a temporary directory that it renames on success.
            template = tfds.core.ShardedFileTemplate(
                dataset_name=self.name,
                data_dir=self.data_path,
                split=self.split_name,
                filetype_suffix="array_record",
            )
            # Shards of another plan are other shards.
            plan = hashlib.sha256(
                f"{self._metadata['fingerprint']} {list(self._shards)}".encode()
            ).hexdigest()
            written = self._write_shards(Path(self.data_path).parent / UNFINISHED / plan)
            for shard, path in enumerate(written):
                final = template.sharded_filepath(shard_index=shard, num_shards=len(written))
                os.replace(path, os.fspath(final))
            num_bytes = sum(map(_bytes_in, written))
            split = tfds.core.SplitInfo(
                name=self.split_name,
                shard_lengths=list(self._shards),
                num_bytes=num_bytes,
                filename_template=template,
            )
            self.info.set_splits(tfds.core.splits.SplitDict([split]))

        def _write_shards(self, folder: Path) -> list[Path]:
            """The shards' files, of which those are written that are not there."""
            folder.mkdir(parents=True, exist_ok=True)
            there = {shard_number(path): path for path in folder.glob("*-*")}
            ends = list(itertools.accumulate(self._shards))
            tasks = [
                (folder / f"{shard:05d}", self._records[end - length : end])
                for shard, (length, end) in enumerate(zip(self._shards, ends, strict=True))
                if shard not in there
            ]
            with progress_bar(show=self._show_progress) as progress, self._writers() as (write, writers):
                left = sum(len(records) for _, records in tasks)
                task = progress.add_task(f"preparing {self.name}", total=ends[-1], completed=ends[-1] - left)
                for (path, records), num_bytes in map_in_order(write, tasks, writers, ahead=1):
                    there[shard_number(path)] = path.with_name(f"{path.name}-{num_bytes}")
                    progress.advance(task, len(records))
            return [there[shard] for shard in range(len(self._shards))]

        def _make_download_manager(self, download_dir: Any, download_config: Any) -> Any:
            return types.SimpleNamespace(downloaded_size=0)  # tfds's own would leave empty folders behind

        def _log_download_bytes(self) -> None:
            pass  # nothing is downloaded; the progress bar tells the rest

        def _log_download_done(self) -> None:
            pass


def shard_number(path: Path) -> int:
    """Which shard an unfinished version's file is; its name is `NUMBER` and, when it is complete, `-BYTES`."""
    return int(path.name.partition("-")[0])


def _bytes_in(path: Path) -> int:
    return int(path.name.partition("-")[2])


@functools.cache
def _serializer(features: Callable[[], Features]) -> tuple[Any, Any]:
    dictionary = tfds.features.FeaturesDict(features())
    return dictionary, tfds.core.example_serializer.ExampleSerializer(dictionary.get_serialized_info())


def write_shard(path: Path, features: Callable[[], Features], examples: Iterable[dict[str, Any]]) -> int:
    """Writes a shard as `PATH-BYTES`, whole or not at all, and returns the bytes of its records.

    Raises:
      OSError: it cannot be written.
    """
    dictionary, serializer = _serializer(features)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    num_bytes = 0
    try:
        with _shard_writer(os.fspath(temporary)) as writer:
            for example in examples:
                record = serializer.get_tf_example(dictionary.encode_example(example))
                # The fields of a record are a map, which protobuf writes in another order in every process.
                data = record.SerializeToString(deterministic=True)
                writer.write(data)
                num_bytes += len(data)
        sync_file(os.fspath(temporary))
        os.replace(temporary, path.with_name(f"{path.name}-{num_bytes}"))
    finally:
        temporary.unlink(missing_ok=True)
    return num_bytes


@contextlib.contextmanager
def _shard_writer(path: str) -> Iterator[array_record_module.ArrayRecordWriter]:
    """An ArrayRecord file being written; the errors of its C++ code (a full disk) become OSErrors."""
    try:
        writer = array_record_module.ArrayRecordWriter(path, WRITER_OPTIONS)
        try:
            yield writer
        finally:
            writer.close()
    except RuntimeError as error:
        raise not_written(error) from error


def not_written(error: Exception) -> OSError:
    """What is told of a full disk, by the name that the layer below gives it."""
    said = " ".join(str(error).splitlines()[:1])
    return OSError(
        f"prepared data could not be written ({said}); nothing half-written stays: make room and give the same command "
        "again"
    )


def write_version(
    builder_class: type[VersionBuilder],
    data_dir: str | Path,
    name: str,
    fingerprint: str,
    *,
    instructions: str = "",
    **arguments: Any,
) -> Path:
    """Writes the next version of a data set.

    Args:
      builder_class: what writes it.
      data_dir: where prepared data sets live.
      name: the data set's.
      fingerprint: of what it is made from; also in the builder's metadata.
      instructions: what to download, for tfds.
      **arguments: the builder's own.

    Returns:
      The version's directory. If another process has finished the same meanwhile, that one.

    Raises:
      DataError: another process wrote the version meanwhile from other data.
      OSError: it cannot be written.
    """
    root = Path(data_dir) / name
    version = next_version(root)
    fields = {"name": name, "VERSION": version, "MANUAL_DOWNLOAD_INSTRUCTIONS": instructions or None}
    with tfds.core.registered.skip_registration():  # a class per version: tfds keeps it on the class
        versioned = type("_Builder", (builder_class,), fields)
    builder = versioned(data_dir=os.fspath(data_dir), file_format="array_record", **arguments)
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=config)
    except OSError:
        if find_version(root, fingerprint) is None:
            raise  # otherwise another process has finished the same version first
    existing = find_version(root, fingerprint)
    if existing is None:
        raise DataError(f"{root}/{version} was written meanwhile from other data; prepare again")
    shutil.rmtree(root / UNFINISHED, ignore_errors=True)
    return existing


class Records:
    """The records of a complete version, images encoded as they were; safe in threads and in worker processes."""

    def __init__(self, directory: Path, split: str, features: Callable[[], Features]):
        """Opens the shards of a split.

        Args:
          features: makes the features that its records were written with; a function of a module, as it is pickled.

        Raises:
          DataError: shards are missing or damaged.
        """
        self._arguments = (directory, split, features)
        pattern = re.compile(rf".+-{split}\.array_record-(\d{{5}})-of-(\d{{5}})")
        found = sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name))
        places = [tuple(map(int, pattern.fullmatch(path.name).groups())) for path in found]
        if not places or places != [(index, places[0][1]) for index in range(places[0][1])]:
            raise DataError(
                f"{directory}: shards of its {split!r} records are missing; move it away, prepare again"
            )
        self._files = [RecordFile(path) for path in found]
        self._ends = list(itertools.accumulate(file.count for file in self._files))
        try:
            self._shards = array_record_data_source.ArrayRecordDataSource([os.fspath(path) for path in found])
        except (RuntimeError, ValueError, OSError) as error:
            said = " ".join(str(error).splitlines()[:1])
            raise DataError(
                f"{directory}: a shard is damaged ({said}); move it away, prepare again"
            ) from None
        if len(self._shards) != self._ends[-1]:
            raise DataError(f"{directory}: a shard's index is damaged; move it away, prepare again")
        written = tfds.features.FeaturesDict(features()).get_serialized_info()
        self._parser = tfds.core.example_parser.ExampleParserNp(written)

    def __reduce__(self):
        return type(self), self._arguments

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record.

        Raises:
          DataError: it is damaged, or compressed (`record_files`).
        """
        if 0 <= index < len(self):
            which = bisect.bisect_right(self._ends, index)
            self._files[which].check(index - self._ends[which] + self._files[which].count)
        try:
            return self._parser.parse_example(self._shards[index])
        except Exception as error:  # array_record, protobuf and tfds raise many kinds on damaged data
            said = " ".join(str(error).splitlines()[:1])
            raise DataError(
                f"{self._arguments[0]}: record {index} is damaged ({said}); move it away, prepare again"
            ) from error


def plan_shards(sizes: Iterable[int], shard_bytes: int) -> list[int]:
    """How many records each shard takes so that it holds about `shard_bytes` of images.

    Args:
      sizes: bytes of each record's images.
      shard_bytes: a new shard is begun rather than hold more, unless one record alone does.
    """
    shards, filled = [0], 0
    for size in sizes:
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
    """One above the highest version of a data set's directory."""
    return tfds.core.Version(f"{max((number for number, _ in _versions(directory)), default=0) + 1}.0.0")


def complete_versions(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The complete versions of a data set and what was noted beside them, the newest first."""
    for _, path in reversed(_versions(directory)):
        if (metadata := read_metadata(path)) is not None:
            yield path, metadata


def find_version(directory: Path, fingerprint: str) -> Path | None:
    """The newest complete version with this fingerprint."""
    return next(
        (path for path, noted in complete_versions(directory) if noted["fingerprint"] == fingerprint), None
    )


def read_metadata(directory: Path) -> dict[str, Any] | None:
    """What was noted beside the data, or None if this is not a complete version of our making."""
    try:
        metadata = read_json(directory / "metadata.json")
        complete = (directory / "dataset_info.json").is_file()
    except (OSError, DataError):
        return None
    if not isinstance(metadata, dict) or not complete:
        return None
    fits = isinstance(metadata.get("fingerprint"), str) and isinstance(metadata.get("samples"), int)
    return metadata if fits else None


def sync_file(path: str) -> None:
    """Forces a file to the disk, so that a version that appears complete also is after a power failure."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
