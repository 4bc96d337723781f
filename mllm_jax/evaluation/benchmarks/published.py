"""What published benchmarks have in common: files with default names, official prompts, options, uploads.

A benchmark is a subclass with a few attributes, `items()`, which turns the rows of its files into questions, and the
rule for answers (see `base.Benchmark`). All else is here: the stored rows, the annotations that the scorer reads, the
prepared form.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.data.reading import DataError
from mllm_jax.evaluation.benchmarks.base import IMAGES, UNUSABLE, VIDEOS, Benchmark, Question
from mllm_jax.evaluation.benchmarks.question_files import EmbeddedImages, FileRow, read_rows
from mllm_jax.evaluation.benchmarks.video_files import VideoFiles
from mllm_jax.evaluation.grouping import Entry, load_groups
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import BenchmarkError, Row
from mllm_jax.evaluation.store import AnswerFile, Key
from mllm_jax.evaluation.vqa_normalize import m4c_normalize
from mllm_jax.schema import did_you_mean
from mllm_jax.storage import Path, as_path, make_folder

# LLaVA-1.5's two instructions, and the limits of its two answering loops.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SHORT_TOKENS, LONG_TOKENS = 128, 1024
VIDEO_SUFFIXES = (
    "",
    ".mp4",
    ".avi",
    ".mov",
    ".mkv",
)  # tried in this order, as upstream; some names have theirs
_SHOWN = 3  # missing videos that are named


@dataclasses.dataclass(frozen=True)
class File:
    """A file or folder that a benchmark is read from.

    Attributes:
      names: default names below the benchmark's folder, the first that exists is taken; `*` matches several files,
        `{option}` is replaced by an option's value.
      where: where it is downloaded.
      needed: False for files that only a score or an upload needs.
    """

    names: tuple[str, ...]
    where: str
    needed: bool = True


@dataclasses.dataclass(frozen=True)
class Option:
    """A choice that a benchmark leaves open: its default, what it means, and the valid values (empty: any).

    `decoding`: it only says how answers are generated, not what is asked, so that prepared data serve all its values.
    """

    default: bool | str
    about: str
    valid: tuple[str, ...] = ()
    decoding: bool = False

    def read(self, text: str) -> bool | str:
        """A value from the command line.

        Raises:
          ValueError: none of the valid ones.
        """
        if isinstance(self.default, bool):
            if text.lower() not in ("true", "false"):
                raise ValueError(f"{text!r} is neither 'true' nor 'false'")
            return text.lower() == "true"
        if self.valid and text not in self.valid:
            raise ValueError(f"{text!r} is none of {', '.join(self.valid)}")
        return text


@dataclasses.dataclass(frozen=True)
class Upload:
    """The file (or folder) that a benchmark's server or official script takes; `{name}` is the benchmark's."""

    file: str
    to: str


class Published(Benchmark):
    """A published benchmark, read from its official files.

    Attributes:
      files: role -> file; "questions" is the one that `path` may name, "images" the folder of images, "videos" that of
        videos.
      video_prefix: what the files of videos may have before the names in the questions.
      options: name -> option.
      folder_name: of its folder below the data folder; "" = the name.
      judged: whether a GPT model decides what an answer is worth, so that answers alone have no score.
      comparable: whether blind answers and the majority answer say something.
      grouping: name in the file of groups; "" = the name.
      upload: what can be submitted; None if nothing.
      values: the options' values.
      answers_known: whether all right answers are known and no judge is needed.
      files_read: the question and annotation files.
      source: where prompts and images come from, if the benchmark was prepared; see `evaluation.prepared`.
      listed: all questions; `questions` are those whose videos are there.
    """

    files: ClassVar[Mapping[str, File]]
    options: ClassVar[Mapping[str, Option]] = {}
    max_new_tokens: ClassVar[int] = LONG_TOKENS
    folder_name: ClassVar[str] = ""
    annotations_name: ClassVar[str] = "annotations.json"
    judged: ClassVar[bool] = False
    comparable: ClassVar[bool] = True
    grouping: ClassVar[str] = ""
    upload: ClassVar[Upload | None] = None
    video_prefix: ClassVar[str] = ""

    def __init__(self, path: str | Path, images: str | Path | None = None, **options: bool | str):
        """Takes the benchmark's folder with its files under their default names, or its question file.

        Args:
          images: folder of the images, where they are not inside the tables.

        Raises:
          BenchmarkError: a missing file (with where to get it), a file that cannot be used, or an unknown option.
        """
        path = as_path(path)
        if path.suffix and not path.exists():
            raise BenchmarkError(f"{self.name}: {path}: no such file")
        self._images = as_path(images) if images else None
        folder = path.parent if path.is_file() else path
        self._open(path, folder, self._images or folder, self.read_options(options))
        self._finish(self.read())

    @classmethod
    def from_source(cls, source: Any, **options: bool | str) -> "Published":
        """The benchmark as `evaluation.prepared` wrote it.

        Args:
          source: a `tfds_benchmarks.BenchmarkSource`.
          **options: those of decoding; all others were chosen when it was written.

        Raises:
          BenchmarkError: another benchmark's, or an option that was chosen already.
        """
        if source.metadata["kind"] != cls.name:
            raise BenchmarkError(f"{source.directory} holds {source.metadata['kind']!r}, not {cls.name!r}")
        decoding = cls.decoding_options()
        if fixed := {name: value for name, value in options.items() if name not in decoding}:
            raise BenchmarkError(
                f"{source.directory} is prepared: its options are chosen already, not {fixed}"
            )
        self = cls.__new__(cls)
        written = {n: value for n, value in source.metadata["options"].items() if n not in decoding}
        self._images = None
        self._open(source.directory, source.directory, source.directory, cls.read_options(options) | written)
        self.source = source
        try:
            prompts = [(one.images, prompt) for one in source.sets for prompt in one.prompts]
            self._finish([Question(**p | {"images": i, "options": tuple(p["options"])}) for i, p in prompts])
        except UNUSABLE as error:
            raise BenchmarkError(
                f"{source.directory}: damaged questions ({error!r}); move the folder away, prepare again"
            ) from error
        return self

    def _open(self, path: Path, folder: Path, images: Path, values: dict[str, bool | str]) -> None:
        self.path, self.folder, self.images, self.values = path, folder, images, values
        self.source: Any = None
        self.files_read: list[Path] = []
        self.embedded = EmbeddedImages()

    def _finish(self, questions: Sequence[Question]) -> None:
        self.listed = there = questions
        self._has_videos = any(question.medium == VIDEOS for question in questions)
        if self._has_videos:
            there = self.video_files.resolve(questions)
            if not there:
                raise BenchmarkError(
                    f"{self.name}: {self.missing_videos}; get them from {self.files['videos'].where}"
                )
        self.set_questions(there)
        known = all(question.row["gold"] is not None for question in questions)
        self.answers_known = known and not self.judged
        self.has_baselines = self.answers_known and self.comparable

    def items(self) -> Iterable[Question]:
        """The questions, in the file's order."""
        raise NotImplementedError

    def read(self) -> list[Question]:
        """Questions about the same images together; else in the file's order."""
        try:
            items = list(self.items())
        except (BenchmarkError, DataError):
            raise
        except UNUSABLE as error:  # fields that are missing or of other types
            said = f"lacks {error}" if isinstance(error, KeyError) else f"is of another type ({error})"
            files = ", ".join(map(str, self.files_read)) or self.folder
            raise BenchmarkError(f"{self.name}: {files}: a field {said}; fetch the files again") from error
        together: dict[tuple[str, ...] | int, list[Question]] = {}
        for number, item in enumerate(items):
            together.setdefault(item.images or number, []).append(item)
        shown = [item for item in items if item.medium == IMAGES]
        embedded = any(image in self.embedded for item in shown for image in item.images)
        if shown and "images" in self.files and not embedded:
            self.images = self.paths("images")[0]
        return [item for group in together.values() for item in group]

    @functools.cached_property
    def video_files(self) -> VideoFiles:
        """The videos.

        Raises:
          BenchmarkError: there is no folder of them.
        """
        return VideoFiles(self.paths("videos")[0], self.video_prefix)

    @property
    def videos(self) -> Path:
        """The folder of videos."""
        return self.video_files.folder

    @property
    def missing_videos(self) -> str:
        """How many videos are not there, in words; "" if none is."""
        return self.video_files.told if self._has_videos else ""

    def unasked(self) -> dict[str, Any]:
        return self.video_files.as_scores() if self._has_videos else {}

    def question(
        self,
        number: str | int,
        prompt: str,
        images: Sequence[str] = (),
        gold: str | list[str] | None = None,
        options: Sequence[str] = (),
        *,
        ability: str = "",
        fields: Row | None = None,
        truth: Row | None = None,
        rotation: int = 0,
        interleaved: bool = False,
        medium: str = IMAGES,
        segment: tuple[int | float, int | float] | None = None,
    ) -> Question:
        """A question with its stored row.

        Args:
          number: its id, unique together with `rotation`.
          prompt: the words, instruction included.
          images: names that `read_image` understands, or the name of a video without suffix.
          gold: the right answer, or those of several people; None where it is not public.
          options: answers whose likelihood can be compared; letters of multiple choice.
          ability: the sub-task.
          fields: further fields of the stored row, for the scorer and for uploads.
          truth: what the scorer's annotations say of this question.
          rotation: of a question id that occurs several times.
          interleaved: whether `<image>` in the prompt marks where the images go (else they stand before it).
          medium, segment: see `Question`.
        """
        row: dict[str, Any] = {"question_id": number, **(fields or {}), "gold": gold, "truth": truth or {}}
        if rotation:
            row["rotation"] = rotation
        if ability:
            row["ability"] = ability
            row["group"] = self._groups[ability].group if ability in self._groups else ""
        shown = {"interleaved": interleaved, "medium": medium, "segment": segment}
        return Question(row, prompt, tuple(images), tuple(options), **shown)

    @functools.cached_property
    def _groups(self) -> Mapping[str, Entry]:
        return load_groups().get(self.grouping or self.name, {})

    @property
    def ungrouped(self) -> list[str]:
        """Sub-tasks that the groups of this benchmark do not have."""
        abilities = dict.fromkeys(question.row.get("ability", "") for question in self.questions)
        return [name for name in abilities if self._groups and name and name not in self._groups]

    # --- files ----------------------------------------------------------------------------------------------------

    def paths(self, role: str) -> list[Path]:
        """The files of a role; several where its name is a pattern, none for a file that is not needed.

        Raises:
          BenchmarkError: a needed file is missing.
        """
        if role == "questions" and self.path.is_file():
            return [self.path]
        if role in ("images", "videos") and self._images is not None:
            return [self._images]
        file = self.files[role]
        names = [name.format(**self.values) for name in file.names]
        for name in names:
            found = sorted(self.folder.glob(name)) if "*" in name else [self.folder / name]
            if found and all(path.exists() for path in found):
                return found
        if not file.needed:
            return []
        also = f" (nor {', '.join(names[1:])})" if names[1:] else ""
        first = self.folder / names[0]
        raise BenchmarkError(f"{self.name}: {first} is missing{also}; download it from {file.where}")

    def rows(self, role: str = "questions", key: str = "") -> list[FileRow]:
        """The rows of all files of a role, none where an optional one is not there; `key` as in `read_rows`."""
        return [row for path in self.paths(role) for row in self.read_table(path, key)]

    def read_table(self, path: Path, key: str = "") -> list[FileRow]:
        """The rows of one file."""
        self.files_read.append(path)
        return read_rows(path, self.embedded, key)

    def read_image(self, name: str) -> bytes:
        return self.source.image(name) if self.source is not None else self.own_image(name)

    def own_image(self, name: str) -> bytes:
        """The encoded image, from the benchmark's own files."""
        return self.embedded.read(name) if name in self.embedded else super().read_image(name)

    def image_file(self, name: str) -> Path | None:
        return None if name in self.embedded else self.images / name

    # --- answers --------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        """Short answers: the normalised text."""
        return (m4c_normalize(text), "normalised") if text.strip() else (None, "unparsed")

    def annotation(self, question: Question) -> dict[str, Any]:
        """What the scorer reads beside an answer."""
        return {"question_id": question.row["question_id"], **question.row["truth"]}

    def write_annotations(self, questions: Sequence[Question], path: Path) -> None:
        """Writes what the scorer reads beside the answers."""
        rows = [self.annotation(question) for question in questions]
        files.write_json(path, rows, indent=None)

    def annotations_for(self, predictions: Path) -> Path:
        """Written beside the answers, so that `mllm-jax score` repeats the score without the benchmark."""
        questions, path = self.listed, predictions.parent / self.annotations_name
        if predictions.stem == "likelihood":  # open questions have no options
            questions = [question for question in questions if question.options]
            path = path.with_stem(f"{path.stem}_likelihood")
        self.write_annotations(questions, path)
        return path

    def score_answers(self, predictions: Path) -> dict[str, Any] | None:
        """The official score, None where the right answers are not public or a judge has to decide."""
        return super().score_answers(predictions) if self.answers_known else None

    def credits(self, predictions: Path) -> dict[Key, float]:
        return super().credits(predictions) if self.answers_known else {}

    def submission(self, rows: Sequence[Row]) -> Any:
        """The JSON value of the upload, or the rows of a `.jsonl` one, from stored answers to all questions."""
        raise NotImplementedError

    def write_submission(self, rows: Sequence[Row], path: Path) -> None:
        """Writes the upload.

        Raises:
          BenchmarkError: a file that it needs is missing.
        """
        value = self.submission(rows)
        values = value if path.suffix == ".jsonl" else [value]
        text = "\n".join(json.dumps(one, ensure_ascii=False) for one in values)
        files.write_text(path, text + "\n" * (path.suffix == ".jsonl"))

    def submit(self, directory: Path) -> list[str]:
        """Writes the upload from stored answers into `DIRECTORY/submission/`, over an earlier one.

        Returns:
          What was written, or why not, in lines for people; nothing for a benchmark without an upload.
        """
        if self.upload is None:
            return []
        found = AnswerFile(directory / "predictions.jsonl", writable=False).rows
        missing = [question.key for question in self.questions if question.key not in found]
        if missing:
            return [f"no submission: {len(missing)} questions are not answered, the first is {missing[0][0]}"]
        target = directory / "submission" / self.upload.file.format(name=self.name)
        make_folder(target.parent)
        try:
            self.write_submission([found[question.key] for question in self.questions], target)
        except BenchmarkError as error:
            return [f"no submission: {error}"]
        return [f"submission for {self.upload.to}: {target}"]

    # --- options --------------------------------------------------------------------------------------------------

    @classmethod
    def decoding_options(cls) -> frozenset[str]:
        """Names of the options that only say how answers are generated."""
        return frozenset(name for name, option in cls.options.items() if option.decoding)

    @classmethod
    def read_options(cls, given: Mapping[str, bool | str]) -> dict[str, bool | str]:
        """All options' values, those that are not given at their defaults.

        Raises:
          BenchmarkError: an unknown option (the nearest is named) or value.
        """
        values = {name: option.default for name, option in cls.options.items()}
        for name, value in given.items():
            if name not in cls.options:
                hint, listed = did_you_mean(name, cls.options), ", ".join(cls.options) or "none"
                raise BenchmarkError(f"{cls.name}: unknown option {name!r}; {hint}valid: {listed}")
            try:
                values[name] = cls.options[name].read(str(value))
            except ValueError as error:
                raise BenchmarkError(f"{cls.name}: option {name!r}: {error}") from error
        return values


def hub(name: str) -> str:
    """The page of a data set on the Hugging Face hub."""
    return f"https://huggingface.co/datasets/{name}"


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    """Options one per line with their letters.

    Example:
        >>> lettered(["cat", "dog"], "({}) {}")
        '(A) cat\\n(B) dog'
    """
    return "\n".join(form.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))
