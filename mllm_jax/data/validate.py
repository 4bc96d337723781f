"""Reads a whole data set before training and finds everything that is wrong with it.

Three passes: the JSON itself (`llava_json`), every image and video file decoded as training will decode it, and, if a
template or a tokenizer is given, every conversation laid out as training will lay it out. Nothing is changed.
"""

import collections
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mllm_jax.data.conversations import SampleError
from mllm_jax.data.images import MAX_PIXELS, ImageError, decode_image
from mllm_jax.data.layout import LayoutRule, Shown, layouts
from mllm_jax.data.llava_json import DuplicateIds, Problem, Record, scan
from mllm_jax.data.reading import DataError, read_image_file
from mllm_jax.data.rows import TooManyLabels, check_fits, check_slots, render_sample
from mllm_jax.data.samples import record_shown, record_video
from mllm_jax.data.templates import Template
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.tokens import SampleTooLong, TooManyImages, encode_sample
from mllm_jax.data.video import pick
from mllm_jax.data.video_layout import Video

Progress = Callable[[str, int, int], None]


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
    """

    template: str | Template | None = None
    tokenizer: Any = None
    seq_len: int | None = None
    visual_layout: LayoutRule | None = None
    image_slots: int | None = None
    label_tokens: int | None = None

    def __post_init__(self):
        if self.tokenizer is not None and None in (self.template, self.seq_len, self.visual_layout):
            raise ValueError("lengths can be checked with a template, seq_len and visual_layout only")


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
    """

    path: str
    samples: int
    sound: int
    broken: int
    problems: tuple[Problem, ...]
    stats: dict[str, Any]

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
      progress: called with the name of the pass, how much of it is done, and how much there is.
    """
    report_progress = progress or (lambda *_: None)
    threads = min(16, os.cpu_count() or 1) if num_threads is None else num_threads
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

    lengths: list[int] = []
    supervised: list[int] = []
    if layout is not None and layout.template is not None:

        def show(record: Record) -> list[Shown]:
            return record_shown(image_root or "", record, compat, max_pixels=max_image_pixels)

        def check_layout(record: Record) -> tuple[Problem | None, int, int]:
            return _check_layout(record, layout, show, compat)

        for done, (_, outcome) in enumerate(map_in_order(check_layout, records, threads), 1):
            problem, length, learned = outcome
            problems += [problem] if problem else []
            lengths += [length] if length else []
            supervised += [learned] if length else []
            report_progress("conversations", done, len(records))

    named = [entry for entry in entries if entry.sample]  # a file that cannot be read has no samples
    bad = {problem.sample for problem in problems}
    shown_videos = len(videos.intersection(users))
    stats = _statistics(records, len(users) - shown_videos, sizes, lengths, supervised)
    if shown_videos:
        stats["videos"] = shown_videos
    sound = sum(entry.sample not in bad for entry in named)
    return Report(str(json_path), len(named), sound, len(broken), tuple(problems), stats)


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


def _check_layout(
    record: Record, layout: Layout, show: Callable[[Record], list[Shown]], compat: str | None
) -> tuple[Problem | None, int, int]:
    """What is wrong with a conversation, its length in tokens and how many of them are learned."""
    images = len(record.images)
    try:
        check_slots(record.id, images, images, layout.image_slots)  # every image fills at least one
        spans = render_sample(record.id, record.conversations, images, layout.template, compat)
        if layout.tokenizer is None:
            return None, 0, 0
        found = layouts(layout.visual_layout, show(record), sample=record.id)
        encoded = encode_sample(spans, layout.tokenizer, found, sample=record.id)
        check_slots(record.id, images, encoded.num_slots, layout.image_slots)
    except TooManyImages as error:
        return Problem("too-many-images", record.id, error.problem), 0, 0
    except (DataError, ImageError):  # reported with the images
        return None, 0, 0
    except SampleError as error:
        return Problem("conversation", record.id, error.problem), 0, 0
    problem = None
    try:
        check_fits(encoded, layout.seq_len, layout.label_tokens)
    except SampleTooLong as error:
        problem = Problem("overlong", record.id, error.problem)
    except TooManyLabels as error:
        problem = Problem("too-many-labels", record.id, error.problem)
    return problem, len(encoded), int((encoded.loss_weights > 0).sum())


def _statistics(
    records: list[Record],
    images: int,
    sizes: list[tuple[int, int]],
    lengths: list[int],
    supervised: list[int],
) -> dict[str, Any]:
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
    if lengths:
        stats["tokens"] = [min(lengths), int(np.median(lengths)), max(lengths)]
        stats["tokens_total"] = sum(lengths)
        stats["learned_tokens"] = sum(supervised)
    return stats
