"""A tensorflow-datasets builder for LLaVA-format data, written as ArrayRecord and read at random.

`prepare` copies the JSON and the encoded bytes of its images into a few large files that Grain can read in
any order, without opening hundreds of thousands of small files each epoch. Images keep their encoding (JPEG
stays JPEG); of a video the frames that are picked are kept, without loss, so that no epoch decodes it again. TensorFlow
is not needed, neither to write nor to read::

    source = prepare("llava_v1_5_mix665k.json", "images", "prepared", name="mix665k")
    source[0].id, source[0].images[0][:4], source[0].conversations

Layout: `DATA_DIR/NAME/VERSION/`. A version's fingerprint is a digest of its samples and of their images' bytes, so that
a copy of the same data elsewhere, or copied again, is the same data set. Same fingerprint: reused. Any other: written
under the next version number, the old one stays. A version directory appears only once it is complete.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from mllm_jax import files
from mllm_jax.console import progress_bar
from mllm_jax.data import llava_json, source_digest
from mllm_jax.data.image_checks import ImageCheck, check_images
from mllm_jax.data.images import ImageError
from mllm_jax.data.llava_json import Scanned
from mllm_jax.data.reading import DataError, parse_json, read_image_file, read_text
from mllm_jax.data.samples import Clip, Sample, record_video
from mllm_jax.data.tfds_versions import (
    SHARD_BYTES,
    UNFINISHED,
    Features,
    Records,
    VersionBuilder,
    complete_versions,
    find_version,
    plan_shards,
    read_metadata,
    write_shard,
    write_version,
)
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.video import pick_encoded
from mllm_jax.data.video_layout import Video
from mllm_jax.data.worker_processes import worker_processes

SPLIT = "train"
CHUNK = 1000  # records that are checked together
STAMPS = "stamps.txt"  # of copies of the data that were found to be the same
SKIPPED = "skipped.jsonl"  # the samples that were left out, one per line, with what is wrong with them

Broken = Literal["error", "skip"]


def sample_features() -> Features:
    """The features of a sample's record."""
    return {
        "id": tfds.features.Text(),
        "images": tfds.features.Sequence(tfds.features.Image()),
        "image_paths": tfds.features.Sequence(tfds.features.Text()),
        "conversations": tfds.features.Text(),  # JSON: a list of {"from", "value"}
    }


def video_features() -> Features:
    """The features of a sample's record in a data set with videos, whose frames are among the images."""
    return {**sample_features(), "frames": tfds.features.Sequence(np.int32)}  # of each video; of an image 0


class LlavaSource:
    """A prepared data set: `len(source)` samples in the JSON's order, `source[i]` is a `Sample`.

    Safe to read from several threads and to send to worker processes.

    Attributes:
      directory: `DATA_DIR/NAME/VERSION`.
      fingerprint: of the samples and images in it.
      skipped: samples of the JSON that are not in it: {"sample", "problem"} each.
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
        self.skipped: list[dict[str, str]] = metadata.get("skipped", [])
        features = video_features if metadata.get("video") else sample_features
        self._records = Records(self.directory, SPLIT, features)
        if len(self._records) != metadata["samples"]:
            raise DataError(
                f"{directory}: holds {len(self._records)} samples instead of {metadata['samples']}; files are missing: "
                "move the directory away and prepare again"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        fields = self._records[index]
        sample = fields["id"].decode()
        return Sample(
            id=sample,
            images=_visuals(tuple(fields["images"]), fields.get("frames")),
            image_paths=tuple(path.decode() for path in fields["image_paths"]),
            conversations=tuple(
                parse_json(fields["conversations"].decode(), f"{self.directory}: {sample!r}")
            ),
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
    broken: Broken = "error",
    max_image_pixels: int | None = None,
    video: Video | None = None,
    check: Callable[[llava_json.Record], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    show_progress: bool = True,
) -> LlavaSource:
    """Writes a LLaVA-format data set as ArrayRecord, or reuses what was written from the same data before.

    Args:
      json_path: LLaVA-format `.json` or `.jsonl` file.
      image_root: the folder its image paths start from; None for a text-only data set.
      data_dir: where prepared data sets live.
      name: the data set's name below `data_dir`: lower-case letters, digits and underscores.
      duplicate_ids, compat: as in `llava_json.read_records`.
      broken: what becomes of a sample that cannot be used whatever the settings (an image that is missing or damaged
        or too large, text that is no text, turns that are no conversation): "error", or "skip" to leave it out and
        list it in `LlavaSource.skipped` and in `skipped.jsonl`.
      max_image_pixels: every image is decoded before anything is written, and one with more pixels refused; None
        leaves images unread until they are used.
      video: which frames are picked of videos; needed where samples show some.
      check: called with every record, to raise what makes it unusable; can be pickled where there are several workers.
      shard_bytes: a new file is begun after about so many bytes of images.
      workers: processes that read, check and write; the result is the same for any number.
      show_progress: draw a progress bar.

    Returns:
      The data set, one sample per sound entry and in the same order.

    Raises:
      DataError: for anything wrong with the JSON and for a missing or unreadable image, naming the sample.
      ImageError: for an image that cannot be decoded or has too many pixels, naming the sample.

    A call that was stopped, however hard, is continued by the next one: images that were checked and shards that were
    written wait in `DATA_DIR/NAME/.unfinished`. In a run of several processes with a shared `data_dir`, let one process
    prepare and the others wait for it; a second one preparing at the same time does the work twice and ends with the
    same result.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"data set name {name!r}: use lower-case letters, digits and underscores")
    json_path, root, versions = Path(json_path), Path(image_root or "."), Path(data_dir) / name
    entries = list(llava_json.scan(json_path, image_root, duplicate_ids=duplicate_ids, compat=compat))
    for entry in entries:
        if entry.problems and (broken == "error" or not entry.skippable):
            raise DataError(entry.problems[0].describe(json_path))
    records = [entry.record for entry in entries if entry.record is not None]
    if check is not None:
        _check_records(check, records, broken, workers, show_progress)
    with_image = next((record for record in records if record.images), None)
    if image_root is None and with_image is not None:
        raise DataError(f"{json_path}: sample {with_image.id!r} has an image but no image folder was given")

    with_video = next((record for record in records if record.videos), None)
    if with_video is not None and video is None:
        raise DataError(
            f"{json_path}: sample {with_video.id!r} shows a video, and model.video.frames is 0; set it to the frames "
            "that are picked of a video"
        )
    videos = frozenset(path for entry in entries for path in entry.videos)
    video = video if videos else None

    stamps = source_digest.image_stamps(entries, root)
    stamp = source_digest.stamp(json_path, stamps, compat, video)
    policy = {"broken": broken, "max_image_pixels": max_image_pixels}
    image_check, folder = ImageCheck(root, compat, max_image_pixels, videos, video), versions / UNFINISHED
    existing = _find(versions, entries, image_check, stamp, policy)
    if existing is not None:
        return LlavaSource(existing)

    digests, faults = _check_images(entries, stamps, image_check, broken, folder, workers, show_progress)
    skipped = [
        {"sample": entry.sample, "problem": fault}
        for entry in entries
        if (fault := entry.problems[0].message if entry.problems else _fault(entry.record, faults))
    ]
    left = [entry.record for entry in entries if entry.record and not _fault(entry.record, faults)]
    if not left:
        raise DataError(f"{json_path}: every sample is broken; the first: {skipped[0]}")
    content = source_digest.content(entries, digests, compat)
    without = hashlib.sha256(json.dumps([content, [one["sample"] for one in skipped]]).encode()).hexdigest()
    fingerprint = without if skipped else content
    existing = find_version(versions, fingerprint)
    if existing is None:
        sizes = (sum(stamps[image][0] for image in record.images) for record in left)
        existing = write_version(
            LlavaVideoBuilder if video else LlavaJsonBuilder,
            data_dir,
            name,
            fingerprint,
            records=left,
            files=MediaFiles(root, video, max_image_pixels),
            workers=workers,
            shards=plan_shards(sizes, shard_bytes),
            metadata={
                "fingerprint": fingerprint,
                "content": content,
                "stamp": stamp,
                "samples": len(left),
                "json": json_path.name,
                "skipped": skipped,
                "max_image_pixels": max_image_pixels,
                **({"video": list(video.picked)} if video else {}),
            },
            show_progress=show_progress,
        )
    shutil.rmtree(folder, ignore_errors=True)
    return LlavaSource(existing)


def prepared(data_dir: str | Path, name: str, fingerprint: str) -> LlavaSource | None:
    """A data set that was prepared before, without its sources; None where it is not there."""
    existing = find_version(Path(data_dir) / name, fingerprint)
    return None if existing is None else LlavaSource(existing)


def _find(
    versions: Path,
    entries: Sequence[Scanned],
    check: ImageCheck,
    stamp: str,
    policy: dict[str, Any],
) -> Path | None:
    """The version that was written from this data, also from a copy of it."""
    usable = [(path, noted) for path, noted in complete_versions(versions) if _serves(noted, policy)]
    for path, noted in usable:
        if stamp in (noted.get("stamp", noted["fingerprint"]), *_stamps(path)):
            return path
    if not usable:
        return None
    images, compat = {image: None for entry in entries for image in entry.images}, check.compat
    digests = source_digest.image_digests(images, check.root, check.videos, check.video)
    content = source_digest.content(entries, digests, compat)
    for path, noted in usable:
        if "content" in noted:
            same = noted["content"] == content
        else:  # written before contents were noted; its fingerprint is its stamp
            same = noted["samples"] == len(entries) and _content(path, compat) == content
        if same:
            with contextlib.suppress(
                OSError
            ):  # it may be read-only; then the images are read again next time
                files.write_text(path / STAMPS, "\n".join([*_stamps(path), stamp]))
            return path
    return None


def _content(directory: Path, compat: str | None) -> str:
    """The content digest of a version; "" if it is damaged."""
    try:
        return source_digest.prepared_content(LlavaSource(directory), compat)
    except DataError:
        return ""


def _serves(noted: dict[str, Any], policy: dict[str, Any]) -> bool:
    """Whether a version holds what these settings would prepare."""
    if noted.get("skipped"):
        return policy == {"broken": "skip", "max_image_pixels": noted["max_image_pixels"]}
    checked, limit = noted.get("max_image_pixels"), policy["max_image_pixels"]
    return checked is None or limit is None or checked <= limit


def _stamps(directory: Path) -> list[str]:
    try:
        return read_text(directory / STAMPS).split()
    except DataError:
        return []


def _fault(record: llava_json.Record | None, faults: dict[str, str]) -> str:
    """What is wrong with the first unusable image of a record; "" if nothing is."""
    return next((faults[image] for image in record.images if image in faults), "") if record else ""


with tfds.core.registered.skip_registration():

    class LlavaJsonBuilder(VersionBuilder):
        """Writes checked LLaVA records and their image files as one ArrayRecord split."""

        split_name = SPLIT
        features = staticmethod(sample_features)

        def __init__(self, *, files: "MediaFiles", workers: int, **kwargs: Any):
            """Takes, beside what `VersionBuilder` takes, what reads images and videos, and a number of processes."""
            self._files, self._workers = files, workers
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            return self._dataset_info(
                "Images and conversations about them, in the format of LLaVA's training data."
            )

        def _example(self, record: llava_json.Record) -> dict[str, Any]:
            return self._files.example(record)

        @contextlib.contextmanager
        def _writers(self) -> Iterator[tuple[Callable[[tuple[Path, Sequence[Any]]], int], int]]:
            if self._workers == 1:
                with super()._writers() as writers:
                    yield writers
                return
            with worker_processes(f"{__name__}:write_records", self._workers, self._files) as write:
                yield write, self._workers

        def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
            super()._download_and_prepare(dl_manager, download_config)
            lines = [json.dumps(one) + "\n" for one in self._metadata["skipped"]]
            if lines:
                files.write_text(Path(self.data_path) / SKIPPED, "".join(lines))

    class LlavaVideoBuilder(LlavaJsonBuilder):
        """The same for records with videos."""

        features = staticmethod(video_features)


@dataclasses.dataclass(frozen=True)
class MediaFiles:
    """Reads what records show, to be written.

    Attributes:
      root: folder that their paths start from.
      video: which frames of videos are picked; None where there are none.
      max_pixels: frames with more are refused; None for the default limit.
    """

    root: Path
    video: Video | None
    max_pixels: int | None

    @property
    def features(self) -> Callable[[], Features]:
        """Of the records that are written."""
        return video_features if self.video else sample_features

    def example(self, record: llava_json.Record) -> dict[str, Any]:
        """A record's fields, as `features` describes them."""
        images: list[bytes] = []
        frames = []
        for place, path in enumerate(record.images):
            if place in record.videos:
                video = record_video(self.root, path, record.id)
                limit = {} if self.max_pixels is None else {"max_pixels": self.max_pixels}
                found = pick_encoded(video, *self.video.picked, **limit)
                frames.append(len(found))
                images += found
            else:
                frames.append(0)
                images.append(read_image_file(self.root, path, record.id))
        fields = {
            "id": record.id,
            "images": [io.BytesIO(image) for image in images],
            "image_paths": list(record.images),
            "conversations": json.dumps(record.conversations, ensure_ascii=False),
        }
        return {**fields, "frames": frames} if self.video else fields


def _visuals(images: tuple[bytes, ...], frames: Int[np.ndarray, " n"] | None) -> tuple[bytes | Clip, ...]:
    """The images and videos of a record, from the images and the frames among them."""
    if frames is None:
        return images
    found, start = [], 0
    for count in map(int, frames):
        stop = start + max(1, count)
        found.append(Clip(images[start:stop]) if count else images[start])
        start = stop
    return tuple(found)


def write_records(files: MediaFiles, task: tuple[Path, Sequence[llava_json.Record]]) -> int:
    """Writes a shard from (path, records); see `write_shard`."""
    path, records = task
    return write_shard(path, files.features, map(files.example, records))


def _check_images(
    entries: Sequence[Scanned],
    stamps: dict[str, tuple[int, int]],
    check: ImageCheck,
    broken: Broken,
    folder: Path,
    workers: int,
    show_progress: bool,
) -> tuple[dict[str, str], dict[str, str]]:
    """The digest of each image, and what is wrong with those that cannot be used; see `check_images`."""
    users: dict[str, str] = {}  # image -> first sample that shows it
    for entry in entries:
        for image in entry.images:
            users.setdefault(image, entry.sample)
    digests, faults = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(show=show_progress) as progress:
        task = progress.add_task("checking images", total=len(users))
        found = check_images(check, users, stamps, folder, workers, lambda n: progress.advance(task, n))
        with contextlib.closing(found):  # or what is under way would be waited for at the end of the program
            for image, (digest, error) in found:
                digests[image] = digest
                if error is not None:
                    if broken == "error":
                        raise error
                    faults[image] = str(error)
    return digests, faults


def _check_records(
    check: Callable[[llava_json.Record], None],
    records: Sequence[llava_json.Record],
    broken: Broken,
    workers: int,
    show_progress: bool,
) -> None:
    """Raises what `check` raises for the first record that is unusable."""
    # Found again when images are looked at.
    tolerated = (DataError, ImageError) if broken == "skip" else ()
    chunks = [records[first : first + CHUNK] for first in range(0, len(records), CHUNK)]
    with progress_bar(show=show_progress) as progress, contextlib.ExitStack() as stack:
        task = progress.add_task("checking conversations", total=len(records))
        done = ((chunk, check_chunk(check, tolerated, chunk)) for chunk in chunks)
        if workers > 1 and len(chunks) > 1:
            processes = worker_processes(f"{__name__}:check_chunk", workers, check, tolerated)
            done = map_in_order(stack.enter_context(processes), chunks, workers, ahead=2)
        for chunk, _ in done:
            progress.advance(task, len(chunk))


def check_chunk(
    check: Callable[[llava_json.Record], None],
    tolerated: tuple[type, ...],
    records: Sequence[llava_json.Record],
) -> None:
    """Checks records; errors of the tolerated kinds do not count."""
    for record in records:
        with contextlib.suppress(*tolerated):
            check(record)
