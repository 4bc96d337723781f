"""Reading and decoding every image and video of a data set once: a broken one is found now and not during training."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mllm_jax.data import source_digest
from mllm_jax.data.images import ImageError, decode_image
from mllm_jax.data.reading import DataError, read_image_file, safe_path
from mllm_jax.data.samples import record_video
from mllm_jax.data.tfds_versions import not_written
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.video import pick
from mllm_jax.data.video_layout import Video
from mllm_jax.data.worker_processes import worker_processes
from mllm_jax.line_file import LineFile, whole_lines

CHUNK = 64  # images of a task

Stamp = tuple[int, int]  # size in bytes and modification time in ns
Checked = tuple[str, DataError | ImageError | None]  # digest, and what is wrong


@dataclasses.dataclass(frozen=True)
class ImageCheck:
    """How images are looked at.

    Attributes:
      root: folder that their paths start from.
      compat: see `images.decode_image`.
      max_pixels: an image with more is refused; None reads the files without decoding them.
      videos: paths that are of videos.
      video: which frames of these are picked.
    """

    root: Path
    compat: str | None
    max_pixels: int | None
    videos: frozenset[str] = frozenset()
    video: Video | None = None

    def __call__(self, image: str, sample: str) -> Checked:
        """The digest of an image that a sample shows, and what is wrong with it."""
        digest = source_digest.MISSING
        try:
            if image in self.videos:
                digest = source_digest.video_digest(safe_path(self.root, image), self.video)
                self._decode(image, sample)
                return digest, None
            data = read_image_file(self.root, image, sample)
            digest = source_digest.image_digest(data)
            if self.max_pixels is not None:
                source = f"sample {sample!r}, {self.root / image}"
                decode_image(data, source=source, compat=self.compat, max_pixels=self.max_pixels)
        except (DataError, ImageError) as error:
            return digest, error
        return digest, None

    def _decode(self, video: str, sample: str) -> None:
        """Decodes the frames of a video that are picked; each of a folder of frames is an image, with its EXIF."""
        opened = record_video(self.root, video, sample)
        if self.max_pixels is not None:
            pick(opened, *self.video.picked, compat=self.compat, max_pixels=self.max_pixels)

    @property
    def name(self) -> str:
        """Tells what was found with these settings from what others find."""
        settings = (str(self.root.absolute()), self.compat, self.max_pixels)
        if self.video is not None:
            settings += (self.video.picked, sorted(self.videos))
        return hashlib.sha256(repr(settings).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def check_chunk(check: ImageCheck, pairs: Sequence[tuple[str, str]]) -> list[Checked]:
    """Looks at (image, sample) pairs."""
    return [check(image, sample) for image, sample in pairs]


def check_images(
    check: ImageCheck,
    users: Mapping[str, str],
    stamps: Mapping[str, Stamp],
    folder: Path,
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[str, Checked]]:
    """(image, what was found) for every image, in order.

    Args:
      users: image -> a sample that shows it.
      stamps: see `source_digest.image_stamps`.
      folder: keeps what sound images were found by a run that was stopped; they are not read again unless touched.
      workers: processes; with one, threads of this process.
      advance: called with how many images are done.
    """
    journal = LineFile(folder / f"images-{check.name}.jsonl")
    known = _known(journal.path)
    left = [(image, sample) for image, sample in users.items() if (image, stamps[image]) not in known]
    advance(len(users) - len(left))
    chunks = (left[first : first + CHUNK] for first in range(0, len(left), CHUNK))

    def found() -> Iterator[Checked]:
        """What `left` is found to be, noted."""
        if workers > 1:
            with worker_processes(f"{__name__}:check_chunk", workers, check) as call:
                yield from noted(map_in_order(call, chunks, workers))
        else:
            look = functools.partial(check_chunk, check)
            yield from noted(map_in_order(look, chunks, source_digest.THREADS))

    def noted(results: Iterator[tuple[Sequence, list[Checked]]]) -> Iterator[Checked]:
        for pairs, checked in results:
            for (image, _), (digest, error) in zip(pairs, checked, strict=True):
                if error is None:
                    note(json.dumps([image, *stamps[image], digest]))
            advance(len(pairs))
            yield from checked

    def note(line: str) -> None:
        try:
            journal.append(line)
        except OSError as error:
            raise not_written(error) from error

    try:
        with contextlib.closing(found()) as fresh:
            for image in users:
                digest = known.get((image, stamps[image]))
                yield image, next(fresh) if digest is None else (digest, None)
    finally:
        with contextlib.suppress(OSError):  # a full disk, which was told before
            journal.close()


def _known(path: Path) -> dict[tuple[str, Stamp], str]:
    """(image, stamp) -> digest of a journal; lines that a power failure has damaged do not count."""
    found = {}
    for line in whole_lines(path, repair=True).splitlines():
        with contextlib.suppress(ValueError, TypeError):
            image, size, time, digest = json.loads(line)
            found[image, (size, time)] = digest
    return found
