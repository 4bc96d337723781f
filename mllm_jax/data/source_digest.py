"""What a data set is, whatever folder it lies in and whenever it was copied there.

Two digests: the content digest of every sample and every image's bytes, which is the data set's identity; and the
stamp of the JSON's bytes and of the images' sizes and times, which says within a second that nothing has changed since.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from mllm_jax.data.llava_json import Record, Scanned
from mllm_jax.data.reading import DataError, read_image_file, safe_path
from mllm_jax.data.samples import Source
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.video_file import VideoError
from mllm_jax.data.video_layout import Video
from mllm_jax.data.video_sources import frame_files

STAMP_FORMAT = 1
MISSING = "missing"  # in the place of the digest of an image that cannot be read
THREADS = min(16, os.cpu_count() or 1)


def image_stamps(entries: Sequence[Scanned], root: Path) -> dict[str, tuple[int, int]]:
    """Size in bytes and modification time in ns of every image that samples name; (0, 0) of one that is not there.

    Of a folder of frames it is the sum of sizes and the latest time.
    """
    stamps: dict[str, tuple[int, int]] = {}
    for entry in entries:
        for image in entry.images:
            if image not in stamps:
                try:
                    path = safe_path(root, image)
                    found = [file.stat() for file in (_frames(path) if path.is_dir() else [path])]
                    times = max((status.st_mtime_ns for status in found), default=0)
                    stamps[image] = (sum(status.st_size for status in found), times)
                except OSError:
                    stamps[image] = (0, 0)
    return stamps


def _frames(folder: Path) -> Sequence[Path]:
    try:
        return frame_files(folder)
    except VideoError:  # told when it is read
        return ()


def stamp(
    json_path: Path, stamps: Mapping[str, tuple[int, int]], compat: str | None, video: Video | None = None
) -> str:
    """A digest that stays the same while no file is touched.

    Args:
      video: which frames of videos are picked; None where there are none.
    """
    # What is read without a repeated id is the same for each `duplicate_ids`; "error" is what older versions noted.
    digest = hashlib.sha256(f"{STAMP_FORMAT} error {compat}\n".encode())
    digest.update(hashlib.sha256(json_path.read_bytes()).digest())
    for image, (size, time) in stamps.items():
        digest.update(f"{image}\0{size}\0{time}\n".encode("utf-8", "surrogatepass"))
    if video is not None:
        digest.update(repr(video.picked).encode())
    return digest.hexdigest()


def image_digest(data: bytes) -> str:
    """The digest of an encoded image."""
    return hashlib.sha256(data).hexdigest()


def video_digest(path: Path, video: Video) -> str:
    """The digest of a video, file or folder, and of which of its frames are picked; `MISSING` if it is not there."""
    whole = hashlib.sha256(repr(video.picked).encode())
    try:
        for file in frame_files(path) if path.is_dir() else [path]:
            with open(file, "rb") as data:
                whole.update(hashlib.file_digest(data, "sha256").digest())
    except (OSError, VideoError):
        return MISSING
    return whole.hexdigest()


def image_digests(
    images: Iterable[str], root: Path, videos: Collection[str] = (), video: Video | None = None
) -> dict[str, str]:
    """The digest of each image or video, `MISSING` of one that cannot be read.

    Args:
      images: paths of images and videos below `root`.
      videos: which of them are videos.
      video: which frames of these are picked.
    """

    def digest(image: str) -> str:
        try:
            if image in videos:
                return video_digest(safe_path(root, image), video)
            return image_digest(read_image_file(root, image, ""))
        except DataError:
            return MISSING

    return dict(map_in_order(digest, images, THREADS))


def content(entries: Sequence[Scanned], digests: Mapping[str, str], compat: str | None) -> str:
    """The content digest of the entries of a data file and their images."""
    whole = hashlib.sha256(f"content {compat}\n".encode())
    for entry in entries:
        if entry.record is None:
            whole.update(
                f"{entry.sample}\n{[p.kind for p in entry.problems]}\n".encode("utf-8", "surrogatepass")
            )
        else:
            whole.update(_record_digest(entry.record, [digests[image] for image in entry.record.images]))
    return whole.hexdigest()


def prepared_content(source: Source, compat: str | None) -> str:
    """The content digest of prepared data, equal to that of the files that it was made from."""
    whole = hashlib.sha256(f"content {compat}\n".encode())
    for sample in (source[index] for index in range(len(source))):
        record = Record(sample.id, sample.image_paths, sample.conversations)
        whole.update(_record_digest(record, [image_digest(image) for image in sample.images]))
    return whole.hexdigest()


def _record_digest(record: Record, images: Sequence[str]) -> bytes:
    turns = [[turn["from"], turn["value"]] for turn in record.conversations]
    return hashlib.sha256(json.dumps([record.id, record.images, images, turns]).encode()).digest()
