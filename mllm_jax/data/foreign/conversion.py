"""A data set as people publish it, written as LLaVA JSON lines beside an image folder; continued where it was stopped.

    OUT/train.jsonl    samples, in the order of the data set
    OUT/images/...     their images, as they were
    OUT/report.json    what was left out or changed, and why

Row groups of Parquet, tars and stretches of JSON are converted alone, in several processes, and each waits in
`OUT/.unfinished` until all are there. Any number of processes writes the same files.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_jax import files
from mllm_jax.data.foreign import sources
from mllm_jax.data.foreign.drafts import Draft, Style, drafts
from mllm_jax.data.foreign.layouts import Layout, recognize
from mllm_jax.data.foreign.media import MediaStore
from mllm_jax.data.foreign.report import Dropped, Report
from mllm_jax.data.foreign.sources import Files, Part
from mllm_jax.data.images import MAX_PIXELS
from mllm_jax.data.llava_json import entry_problems
from mllm_jax.data.reading import DataError, parse_json, read_json
from mllm_jax.data.sample_keys import MEDIA
from mllm_jax.data.threads import map_in_order
from mllm_jax.data.worker_processes import worker_processes

SAMPLES, IMAGES, REPORT, UNFINISHED = "train.jsonl", "images", "report.json", ".unfinished"

Json = Any
Sample = dict[str, Json]


@dataclasses.dataclass(frozen=True)
class Job:
    """What all parts of a conversion have in common.

    Attributes:
      out: the folder to fill.
      layout, style: what rows mean, and how conversations are written.
      images: the folder that paths of images start from.
      max_image_pixels: larger images are left out.
      strict: the first sample that would be left out is an error.
    """

    out: Path
    layout: Layout
    style: Style
    images: Path
    max_image_pixels: int
    strict: bool


@dataclasses.dataclass(frozen=True)
class Converted:
    """The outcome of `convert_files`.

    Attributes:
      files: what was read.
      layout: what it was recognized as.
      report: what became of the samples.
    """

    files: Files
    layout: Layout
    report: Report


def convert_files(
    source: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    columns: Mapping[str, str] | None = None,
    images: str | Path | None = None,
    pattern: str | None = None,
    style: Style | None = None,
    max_image_pixels: int = MAX_PIXELS,
    strict: bool = False,
    workers: int = 1,
    recognized: Callable[[Files, Layout, Collection[str]], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Converts Parquet, WebDataset or JSON files into a new folder; the same call continues one that was stopped.

    Args:
      source: a file, or a folder of them.
      out: the folder to make; must not exist, be empty, or hold an unfinished conversion of the same kind.
      layout: a key of `layouts.NEEDS`; None recognizes it from the columns of the first row.
      columns: field -> column, for columns of other names.
      images: where paths of images start from; None for the folder of `source`.
      pattern: of the names of files in a folder.
      style: how conversations are written.
      max_image_pixels: an image with more is unusable.
      strict: stop at the first sample that would be left out.
      workers: processes.
      recognized: called before anything is converted with what was recognized, and by which columns.
      progress: called with the number of entries that were read since the last call.

    Raises:
      DataError: files that cannot be read or recognized, an output folder in use, no sample left, and with `strict` the
        first sample that cannot be used; names file and sample.
    """
    source, out = Path(source), Path(out)
    found = sources.find(source, pattern)
    there = sources.columns(found)
    known = recognize(there, layout, columns, str(found.paths[0]))
    root = Path(images) if images is not None else found.root
    if not root.is_dir():
        raise DataError(f"{root}: no such folder of images")
    job = Job(out, known, style or Style(), root.absolute(), max_image_pixels, strict)
    _begin(job)
    (job.out / IMAGES).mkdir(exist_ok=True)
    if recognized:
        recognized(found, known, there)
    keys = []
    for part, read in _each_part(job, found, workers):
        keys.append(part.key)
        if progress:
            progress(read)
    report = _join(job, keys)
    for path in found.left:
        report.leave("files of other kinds", path.name)
    if not report.written:
        kind, tally = max(report.dropped.items(), key=lambda item: item[1].count, default=("", None))
        said = f"; the most frequent reason is {kind}: {tally.example}" if tally else ""
        raise DataError(f"{source}: no sample of {report.read} can be used{said}")
    described = {"source": str(source), "files": len(found.paths), "kind": found.kind, "layout": known.name}
    files.write_json(out / REPORT, described | report.to_json(), ensure_ascii=True)
    shutil.rmtree(out / UNFINISHED)
    return Converted(found, known, report)


def _begin(job: Job) -> None:
    """Makes the folder, or makes sure that it holds the beginning of the same conversion."""
    settings = {
        "layout": job.layout.name,
        "columns": {field: list(columns) for field, columns in job.layout.fields.items()},
        "style": dataclasses.asdict(job.style),
        "images": str(job.images),
        "max_image_pixels": job.max_image_pixels,
    }
    noted = job.out / UNFINISHED / "settings.json"
    if noted.is_file():
        for path in job.out.rglob(".*.part"):
            if files.is_temporary(path):  # of a process that was killed
                path.unlink(missing_ok=True)
        if read_json(noted) != settings:
            raise DataError(
                f"{job.out}: holds an unfinished conversion with other settings; give the same again, or remove the "
                "folder"
            )
        return
    if job.out.exists() and (
        not job.out.is_dir() or any(path.name != UNFINISHED for path in job.out.iterdir())
    ):
        raise DataError(f"{job.out}: exists already; choose another folder, nothing is overwritten")
    noted.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(noted, settings)


def _each_part(job: Job, found: Files, workers: int) -> Iterator[tuple[Part, int]]:
    """Converts all parts that are not there yet; yields each, in order, with the number of its entries."""
    with contextlib.ExitStack() as stack:
        if workers > 1:
            convert = stack.enter_context(worker_processes(f"{__name__}:convert_part", workers, job))
        else:
            convert = functools.partial(convert_part, job)

        def done(part: Part) -> int:
            if _path(job, part.key).is_file():
                before = _read_report(job, part.key)
                if not (job.strict and before.dropped):  # else converted again, for the error
                    return before.read
            return convert(part)

        yield from map_in_order(done, sources.parts(found), max(1, workers), ahead=2)


def _path(job: Job, key: str) -> Path:
    return job.out / UNFINISHED / f"{key}.jsonl"


def _read_report(job: Job, key: str) -> Report:
    with _path(job, key).open(encoding="utf-8") as file:
        return Report.from_json(parse_json(file.readline(), _path(job, key)))


def convert_part(job: Job, part: Part) -> int:
    """Converts one part into `OUT/.unfinished`: a line with its report, then its samples; returns its entries.

    Raises:
      DataError: as `convert_files`.
    """
    report, samples = Report(), []
    store = MediaStore(job.out / IMAGES, job.images, job.max_image_pixels)
    wanted = job.layout.columns | set(MEDIA)
    for number, row in sources.rows(part, wanted, report.leave):
        report.read += 1
        name = f"{part.name}-{number}"
        try:
            if isinstance(row, Dropped):
                raise row
            given = job.layout.read(row, "id")
            made = isinstance(given, bool) or not isinstance(given, str | int)
            name = name if made else str(given)
            for key in job.layout.unread(row):
                report.leave(key, name)
            for sample, draft in _samples(job, store, row, name):
                samples.append(sample)
                for key in draft.unread:
                    report.leave(key, sample["id"])
                for kind in [*draft.changed, *(["id-made"] * made)]:
                    report.change(kind, sample["id"])
                shown = sample.get("image", [])
                report.images += 1 if isinstance(shown, str) else len(shown)
        except Dropped as dropped:
            if job.strict:
                raise DataError(
                    f"{part.path}: sample {name!r}: {dropped.message} ({dropped.kind}; --strict)"
                ) from None
            report.drop(dropped.kind, name, dropped.message)
    report.written = len(samples)
    files.write_json_lines(_path(job, part.key), [report.to_json(), *samples])
    return report.read


def _samples(job: Job, store: MediaStore, row: Mapping[str, Json], name: str) -> list[tuple[Sample, Draft]]:
    """The samples of a row, with the drafts that they are made of: all of them, or none.

    Raises:
      Dropped: the row cannot be used.
    """
    made = []
    for draft in list(drafts(job.layout, row, job.style)):
        sample: Sample = {"id": f"{name}{draft.suffix}"}
        # Texts and counts first: they cost nothing, and a sample that is left out stores no image.
        shape = {"image": ["x"] * len(draft.images), "video": ["x"] * len(draft.videos)}
        for problem in entry_problems(sample | shape | {"conversations": draft.turns}, name):
            raise Dropped(problem.kind, problem.message)
        if draft.images:
            stored = [store.image(given, name) for given in draft.images]
            sample["image"] = stored[0] if len(stored) == 1 else stored
        if draft.videos:
            stored = [store.video(given) for given in draft.videos]
            sample["video"] = stored[0] if len(stored) == 1 else stored
        made.append((sample | {"conversations": draft.turns}, draft))
    return made


def _join(job: Job, keys: list[str]) -> Report:
    """Writes the samples of all parts into one file, ids made unique; returns the report of all."""
    report, times = Report(), {}
    with files.replacing(job.out / SAMPLES) as file:
        for key in keys:
            with _path(job, key).open(encoding="utf-8") as lines:
                report.add(Report.from_json(parse_json(next(lines), _path(job, key))))
                for line in lines:
                    sample = json.loads(line)
                    given = sample["id"]
                    if given in times:
                        sample["id"] = _numbered(given, times)
                        report.change("id-numbered", given)
                        line = files.json_text(sample) + "\n"
                    times[sample["id"]] = 1
                    file.write(line.encode("utf-8"))
    return report


def _numbered(given: str, times: dict[str, int]) -> str:
    """An id that no sample has had yet."""
    while True:
        times[given] += 1
        if (made := f"{given}#{times[given]}") not in times:
            return made
