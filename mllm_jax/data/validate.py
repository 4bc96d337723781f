"""Reads a whole data set before training and finds everything that is wrong with it.

Three passes: the JSON itself (`llava_json`), every image and video file decoded as training will decode it, and, if a
template or a tokenizer is given, every conversation laid out and counted as training will. Nothing is changed.
"""

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.data.conversations import SampleError
from mllm_jax.data.counts import Count, Counts, count_sample, summary
from mllm_jax.data.images import MAX_PIXELS, ImageError, decode_image
from mllm_jax.data.layout import LayoutRule, layouts
from mllm_jax.data.llava_json import DuplicateIds, Problem, Record, scan
from mllm_jax.data.packing import RowLimits
from mllm_jax.data.reading import DataError, read_image_file
from mllm_jax.data.rows import TooManyLabels, check_fits, check_slots, render_sample
from mllm_jax.data.samples import record_shown, record_video
from mllm_jax.data.templates import Template
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.tokens import SampleTooLong, TooManyImages, encode_sample
from mllm_jax.data.video import pick
from mllm_jax.data.video_layout import Video
from mllm_jax.data.worker_processes import worker_processes

CHUNK = 256  # conversations that a process counts at once
MANY = 4 << 20  # bytes of JSON; what fewer hold is counted sooner than processes start

Progress = Callable[[str, int, int], None]
Outcomes = list[tuple[Problem | None, Count | None]]  # of conversations: what is wrong, and the counts


@dataclasses.dataclass(frozen=True)
class Layout:
    """How training will lay samples out, as far as it is to be checked.

    Attributes:
      template: a conversation template or its name; None checks no template.
      tokenizer: a Hugging Face tokenizer; None checks no lengths.
      seq_len: the row length in tokens, visual tokens included.
      visual_layout: how images become visual tokens; needed for lengths.
      image_slots: images a row has room for; None for any number.
      label_tokens: supervised tokens a row may hold; None for any number.
      samples_per_row: most samples that may share a row, for how full packed rows would be.
    """

    template: str | Template | None = None
    tokenizer: Any = None
    seq_len: int | None = None
    visual_layout: LayoutRule | None = None
    image_slots: int | None = None
    label_tokens: int | None = None
    samples_per_row: int = 64

    def __post_init__(self):
        if self.tokenizer is not None and None in (self.template, self.seq_len, self.visual_layout):
            raise ValueError("lengths can be checked with a template, seq_len and visual_layout only")

    def limits(self, most_slots: int) -> RowLimits:
        """What a row has room for.

        Args:
          most_slots: image slots of a row, where none are given: those of the sample with the most, at least.
        """
        labels = self.seq_len if self.label_tokens is None else self.label_tokens
        slots = self.image_slots or most_slots * self.samples_per_row
        return RowLimits(self.seq_len, slots, labels, self.samples_per_row)


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of `validate`.

    Attributes:
      path: the data file.
      samples: entries in it.
      sound: entries nothing is wrong with.
      broken: entries that `data.broken=skip` leaves out.
      problems: everything found, in file order within each kind of check.
      stats: numbers about the data set: images, text-only samples, answers, sizes and lengths.
      counts: tokens and images of every sample that could be laid out, in file order; empty without a tokenizer.
    """

    path: str
    samples: int
    sound: int
    broken: int
    problems: tuple[Problem, ...]
    stats: dict[str, Any]
    counts: Counts = dataclasses.field(default_factory=lambda: Counts.of(()))

    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems grouped by kind, most frequent kind first."""
        groups: dict[str, list[Problem]] = collections.defaultdict(list)
        for problem in self.problems:
            groups[problem.kind].append(problem)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "data": self.path,
            "samples": self.samples,
            "sound": self.sound,
            "broken": self.broken,
            "counts": {kind: len(problems) for kind, problems in self.by_kind().items()},
            "stats": self.stats,
            "problems": [dataclasses.asdict(problem) for problem in self.problems],
        }


def validate(
    json_path: str | Path,
    image_root: str | Path | None,
    *,
    layout: Layout | None = None,
    duplicate_ids: DuplicateIds = "error",
    compat: str | None = None,
    max_image_pixels: int = MAX_PIXELS,
    video: Video | None = None,
    num_threads: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Reads a data set and reports every problem.

    Args:
      json_path: LLaVA-format `.json` or `.jsonl` file.
      image_root: the folder of its images; None for text-only data.
      layout: what to check conversations against; None checks only what holds for any training.
      duplicate_ids, compat: as in `llava_json.read_records`.
      max_image_pixels: larger images are reported.
      video: which frames of videos are looked at; None for the default of `Video`.
      num_threads: for decoding; None for one per core, up to 16.
      workers: processes that lay out and count conversations, where there are many.
      progress: called with the name of the pass, how much of it is done, and how much there is.
    """
    report_progress = progress or (lambda *_: None)
    threads = min(16, os.cpu_count() or 1) if num_threads is None else num_threads
    checked = None
    if layout is not None and layout.template is not None:
        checked = LayoutCheck(layout, Path(image_root or ""), compat, max_image_pixels)
    with _counting(checked, Path(json_path), workers) as outcomes_of:
        entries = list(scan(json_path, image_root, duplicate_ids=duplicate_ids, compat=compat))
        problems = [problem for entry in entries for problem in entry.problems]
        users: dict[str, list[str]] = collections.defaultdict(list)
        for entry in entries:
            for image in dict.fromkeys(entry.images):
                users[image].append(entry.sample)
        records = [entry.record for entry in entries if entry.record is not None]
        broken = {entry.sample for entry in entries if entry.problems and entry.skippable}

        sizes: list[tuple[int, int]] = []
        videos = {path for entry in entries for path in entry.videos}
        video = video or Video()
        if image_root is None:
            problems += [
                Problem("no-image-folder", record.id, "has images but no image folder was given (--images)")
                for record in records
                if record.images
            ]
        else:
            root = Path(image_root)

            def check(path: str) -> tuple[int, int] | str:
                if path in videos:
                    return _check_video(root, path, video, compat, max_image_pixels)
                return _check_image(root, path, compat, max_image_pixels)

            for done, (image, outcome) in enumerate(map_in_order(check, users, threads), 1):
                if isinstance(outcome, str):
                    kind = "unusable-video" if image in videos else "unusable-image"
                    problems += [Problem(kind, sample, outcome) for sample in users[image]]
                    broken |= set(users[image])
                else:
                    sizes.append(outcome)
                report_progress("images", done, len(users))

        found: list[Count] = []
        if checked:
            done = 0
            for outcomes in outcomes_of(records):
                problems += [problem for problem, _ in outcomes if problem]
                found += [count for _, count in outcomes if count]
                done += len(outcomes)
                report_progress("conversations", done, len(records))
        counts = Counts.of(found)

    named = [entry for entry in entries if entry.sample]  # a file that cannot be read has no samples
    bad = {problem.sample for problem in problems}
    shown_videos = len(videos.intersection(users))
    stats = _statistics(records, len(users) - shown_videos, sizes)
    if len(counts):
        stats |= _token_statistics(counts, layout)
    if shown_videos:
        stats["videos"] = shown_videos
    sound = sum(entry.sample not in bad for entry in named)
    return Report(str(json_path), len(named), sound, len(broken), tuple(problems), stats, counts)


def _check_image(root: Path, name: str, compat: str | None, max_pixels: int) -> tuple[int, int] | str:
    """Width and height of a usable image, or what is wrong with it."""
    try:
        data = read_image_file(root, name, "")
        height, width = decode_image(
            data, source=str(root / name), compat=compat, max_pixels=max_pixels
        ).shape[:2]
    except DataError as error:
        return str(error).removeprefix("sample '': ")
    except ImageError as error:
        return str(error)
    return width, height


def _check_video(
    root: Path, name: str, video: Video, compat: str | None, max_pixels: int
) -> tuple[int, int] | str:
    """Width and height of a usable video, or what is wrong with it."""
    try:
        frames = pick(record_video(root, name, ""), *video.picked, compat=compat, max_pixels=max_pixels)
    except (DataError, ImageError) as error:
        return str(error).removeprefix("sample '', ").removeprefix("sample '': ")
    height, width = frames[0].shape[:2]
    return width, height


@dataclasses.dataclass(frozen=True)
class LayoutCheck:
    """What conversations are laid out with.

    Attributes:
      layout: see `Layout`.
      root: the folder of the images.
      compat, max_pixels: as in `validate`.
    """

    layout: Layout
    root: Path
    compat: str | None
    max_pixels: int

    def __call__(self, record: Record) -> tuple[Problem | None, Count | None]:
        """What is wrong with a conversation, and its counts if it could be laid out and there is a tokenizer."""
        layout, images = self.layout, len(record.images)
        try:
            check_slots(record.id, images, images, layout.image_slots)  # every image fills at least one
            spans = render_sample(record.id, record.conversations, images, layout.template, self.compat)
            if layout.tokenizer is None:
                return None, None
            shown = record_shown(self.root, record, self.compat, max_pixels=self.max_pixels)
            found = layouts(layout.visual_layout, shown, sample=record.id)
            encoded = encode_sample(spans, layout.tokenizer, found, sample=record.id)
            check_slots(record.id, images, encoded.num_slots, layout.image_slots)
        except TooManyImages as error:
            return Problem("too-many-images", record.id, error.problem), None
        except (DataError, ImageError):  # reported with the images
            return None, None
        except SampleError as error:
            return Problem("conversation", record.id, error.problem), None
        problem = None
        try:
            check_fits(encoded, layout.seq_len, layout.label_tokens)
        except SampleTooLong as error:
            problem = Problem("overlong", record.id, error.problem)
        except TooManyLabels as error:
            problem = Problem("too-many-labels", record.id, error.problem)
        return problem, count_sample(encoded)


def check_chunk(check: LayoutCheck, records: Sequence[Record]) -> Outcomes:
    """Lays some conversations out."""
    return [check(record) for record in records]


@contextlib.contextmanager
def _counting(
    check: LayoutCheck | None, path: Path, workers: int
) -> Iterator[Callable[[Sequence[Record]], Iterator[Outcomes]]]:
    """A function that gives the outcomes of conversations, in order, chunk after chunk.

    Where the data file is large, processes do so, which start while it is read.
    """
    with contextlib.ExitStack() as stack:
        call = functools.partial(check_chunk, check)
        if check is None or workers == 1 or not path.is_file() or path.stat().st_size < MANY:
            workers = 1
        else:
            call = stack.enter_context(worker_processes(f"{__name__}:check_chunk", workers, check))

        def outcomes_of(records: Sequence[Record]) -> Iterator[Outcomes]:
            chunks = (records[first : first + CHUNK] for first in range(0, len(records), CHUNK))
            for _, outcomes in map_in_order(call, chunks, workers, ahead=2):
                yield outcomes

        yield outcomes_of


def _statistics(records: list[Record], images: int, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    counts = [len(record.images) for record in records]
    stats: dict[str, Any] = {
        "images": images,
        "text_only": counts.count(0),
        "several_images": sum(count > 1 for count in counts),
        "most_images": max(counts, default=0),
        "answers": sum(turn["from"] == "gpt" for record in records for turn in record.conversations),
    }
    if sizes:
        widths, heights = zip(*sizes, strict=True)
        stats["widths"] = [min(widths), int(np.median(widths)), max(widths)]
        stats["heights"] = [min(heights), int(np.median(heights)), max(heights)]
    return stats


def _token_statistics(counts: Counts, layout: Layout) -> dict[str, Any]:
    tokens = counts.tokens
    return {
        "tokens": [int(tokens.min()), int(np.median(tokens)), int(tokens.max())],
        "tokens_total": int(tokens.sum(dtype=np.int64)),
        "visual_tokens": int(counts.visual.sum(dtype=np.int64)),
        "learned_tokens": int(counts.supervised.sum(dtype=np.int64)),
        "rows": summary(counts, layout.limits(max(1, int(counts.needs[:, 1].max())))),
    }
