"""What published benchmarks have in common: files with default names, official prompts, a scorer, options.

A benchmark is a subclass with a few attributes and `items()`, which turns the rows of its files into `Item`s. All else
is here: the stored rows, the annotations that the scorer reads, the baselines, the likelihood's options.
"""

import abc
import dataclasses
import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.grouping import load_groups
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import PredictionError
from mllm_jax.evaluation.runners.base import BenchmarkError, Question, Runner, most_frequent
from mllm_jax.evaluation.runners.tables import Pictures, read_rows
from mllm_jax.evaluation.vqa_normalize import m4c_normalize

# LLaVA-1.5's two instructions, and the limits of its two answering loops.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SHORT_TOKENS, LONG_TOKENS = 128, 1024

Answers = str | list[str]


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
class Item:
    """One question.

    Attributes:
      id: unique (together with `rotation`).
      prompt: the words, instruction included.
      images: names that `Published.read_image` understands.
      gold: the right answer, or those of several people; None where it is not public.
      options: answers whose likelihood can be compared; letters of multiple choice.
      ability: the sub-task.
      kept: further fields of the stored row, for the scorer and for uploads.
      truth: what the scorer's annotations say of this question.
      rotation: of a question id that occurs several times.
      interleaved: whether `<image>` in the prompt marks where the pictures go (else they stand before it).
    """

    id: str | int
    prompt: str
    images: tuple[str, ...] = ()
    gold: Answers | None = None
    options: tuple[str, ...] = ()
    ability: str = ""
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    truth: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rotation: int = 0
    interleaved: bool = False


class Published(Runner):
    """A published benchmark, read from its official files.

    Attributes:
      files: role -> file; "questions" is the one that `path` may name, "images" the folder of pictures.
      options: name -> option.
      max_new_tokens: the official limit.
      scorer: name in `evaluation.benchmarks`; "" = the kind.
      annotations_name: of the file of right answers that is written beside the answers.
      judged: scored by a GPT model (`mllm-jax judge`), so that nothing is scored here.
      home: name of its folder below the data folder; "" = the kind.
      comparable: whether blind answers and the majority answer say something.
      grouping: name in the file of groups; "" = the kind.
      values: the options' values.
      scored: whether all right answers are known and no judge is needed.
      files_read: the question and annotation files.
      source: where prompts and pictures come from, if the benchmark was prepared; see `runners.prepared`.
    """

    files: ClassVar[Mapping[str, File]]
    options: ClassVar[Mapping[str, Option]] = {}
    max_new_tokens: ClassVar[int] = LONG_TOKENS
    scorer: ClassVar[str] = ""
    annotations_name: ClassVar[str] = "annotations.json"
    judged: ClassVar[bool] = False
    home: ClassVar[str] = ""
    comparable: ClassVar[bool] = True
    grouping: ClassVar[str] = ""

    def __init__(self, path: str | Path, images: str | Path | None = None, **options: bool | str):
        """Takes the benchmark's folder with its files under their default names, or its question file.

        Args:
          images: folder of the pictures, where they are not inside the tables.

        Raises:
          BenchmarkError: a missing file (with where to get it), a file that cannot be used, or an unknown option.
        """
        self.values = self.read_options(options)
        self.files_read: list[Path] = []
        self.source: Any = None
        self.path = Path(path)
        if self.path.suffix and not self.path.exists():
            raise BenchmarkError(f"{self.kind}: {self.path}: no such file")
        self.folder = self.path.parent if self.path.is_file() else self.path
        self.pictures = Pictures()
        self._images = Path(images) if images else None
        self.images = self._images or self.folder
        self._take(self.read())
        self._look_at_answers()

    @classmethod
    def from_source(cls, source: Any, **options: bool | str) -> "Published":
        """The benchmark as `runners.prepared` wrote it.

        Args:
          source: a `tfds_benchmarks.BenchmarkSource`.
          **options: those of decoding; all others were chosen when it was written.

        Raises:
          BenchmarkError: another benchmark's, or an option that was chosen already.
        """
        from mllm_jax.evaluation.runners.prepared import read_questions

        if source.metadata["kind"] != cls.kind:
            raise BenchmarkError(f"{source.directory} holds {source.metadata['kind']!r}, not {cls.kind!r}")
        if fixed := {name: value for name, value in options.items() if name not in cls.decoding_options()}:
            raise BenchmarkError(
                f"{source.directory} is prepared: its options are chosen already, {fixed} cannot be"
            )
        benchmark = cls.__new__(cls)
        written = source.metadata["options"].items()
        chosen = {name: value for name, value in written if name not in cls.decoding_options()}
        benchmark.values = cls.read_options(options) | chosen
        benchmark.files_read = []
        benchmark.source = source
        benchmark.path = benchmark.folder = benchmark.images = source.directory
        benchmark.pictures, benchmark._images = Pictures(), None
        benchmark._take(read_questions(source))
        benchmark._look_at_answers()
        return benchmark

    def _look_at_answers(self) -> None:
        self.scored = not self.judged and all(question.row["gold"] is not None for question in self.questions)
        self.baselines = self.scored and self.comparable

    @abc.abstractmethod
    def items(self) -> Iterable[Item]:
        """The questions, in the file's order."""

    def read(self) -> list[Question]:
        return self._questions_of(list(self.items()))

    # --- files ----------------------------------------------------------------------------------------------------

    def paths(self, role: str) -> list[Path]:
        """The files of a role; several where its name is a pattern, none for a file that is not needed.

        Raises:
          BenchmarkError: a needed file is missing.
        """
        if role == "questions" and self.path.is_file():
            return [self.path]
        if role == "images" and self._images is not None:
            return [self._images]
        file = self.files[role]
        names = [name.format(**self.values) for name in file.names]
        for name in names:
            found = sorted(self.folder.glob(name)) if "*" in name else [self.folder / name]
            if found and all(path.exists() for path in found):
                return found
        if not file.needed:
            return []
        raise BenchmarkError(
            f"{self.kind}: {self.folder / names[0]} is missing{_also(names[1:])}; download it from {file.where}"
        )

    def rows(self, role: str = "questions", key: str = "") -> list[dict[str, Any]]:
        """The rows of all files of a role, none where an optional one is not there; `key` as in `read_rows`."""
        return [row for path in self.paths(role) for row in self.read_table(path, key)]

    def read_table(self, path: Path, key: str = "") -> list[dict[str, Any]]:
        """The rows of one file."""
        self.files_read.append(path)
        return read_rows(path, self.pictures, key)

    def read_image(self, name: str) -> bytes:
        return self.source.picture(name) if self.source is not None else self.picture(name)

    def picture(self, name: str) -> bytes:
        """The encoded picture, from the benchmark's own files."""
        return self.pictures.read(name) if name in self.pictures else super().read_image(name)

    def picture_file(self, name: str) -> Path | None:
        """Where a picture is; None where it is inside a table."""
        return None if name in self.pictures else self.images / name

    # --- asking ---------------------------------------------------------------------------------------------------

    def _questions_of(self, items: Sequence[Item]) -> list[Question]:
        """Prompts of items, those about the same picture together; else in the file's order."""
        groups = load_groups().get(self.grouping or self.kind, {})
        together: dict[tuple[str, ...] | int, list[Question]] = {}
        for number, item in enumerate(items):
            row: dict[str, Any] = {
                "question_id": item.id,
                **item.kept,
                "gold": item.gold,
                "truth": item.truth,
            }
            if item.rotation:
                row["rotation"] = item.rotation
            if item.ability:
                row["ability"] = item.ability
                row["group"] = groups[item.ability].group if item.ability in groups else ""
            question = Question(row, item.prompt, item.images, item.options, interleaved=item.interleaved)
            together.setdefault(item.images or number, []).append(question)
        if items and "images" in self.files and not any(i in self.pictures for x in items for i in x.images):
            self.images = self.paths("images")[0]
        return [question for questions in together.values() for question in questions]

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        """Short answers: the normalised text."""
        return (m4c_normalize(text), "normalised") if text.strip() else (None, "unparsed")

    def is_right(self, row: dict[str, Any]) -> bool | None:
        gold = row["gold"]
        if gold is None:
            return None
        wanted = gold if isinstance(gold, list) else [gold]
        return row["parsed"] is not None and row["parsed"] in [*wanted, *map(m4c_normalize, wanted)]

    def majority(self, questions: Sequence[Question]) -> list[str]:
        """Per sub-task the most frequent right answer, among a question's options the first that it offers."""
        answers: dict[str, list[str]] = defaultdict(list)
        for question in self.questions:
            gold = question.row["gold"]
            answers[question.row.get("ability", "")].append(
                most_frequent(gold)[0] if isinstance(gold, list) else gold
            )
        ranked = {ability: most_frequent(texts) for ability, texts in answers.items()}
        found = []
        for question in questions:
            order = ranked[question.row.get("ability", "")]
            offered = (
                [answer for answer in order if answer in question.options] if question.options else order
            )
            found.append((offered or list(question.options))[0])
        return found

    # --- scoring --------------------------------------------------------------------------------------------------

    def annotations(self, questions: Sequence[Question]) -> Any:
        """What the scorer reads beside the answers; by default one row per question."""
        return [
            {"question_id": question.row["question_id"], **question.row["truth"]} for question in questions
        ]

    def write_annotations(self, questions: Sequence[Question], path: Path) -> None:
        """Writes `annotations` to a file."""
        files.write_json(path, self.annotations(questions), indent=None)

    def score(self, part: str, predictions: Path) -> dict[str, Any] | None:
        """The official score, None where the right answers are not public or a judge has to decide.

        The annotations are written beside the answers, so that `mllm-jax score` repeats it without the benchmark.
        """
        if not self.scored:
            return None
        questions, path = self.questions, predictions.parent / self.annotations_name
        if predictions.stem == "likelihood":  # open questions have no options
            questions, path = (
                [question for question in questions if question.options],
                path.with_stem(f"{path.stem}_likelihood"),
            )
        self.write_annotations(questions, path)
        try:
            return get_benchmark(self.scorer or self.kind).score(predictions, path)
        except PredictionError as error:
            raise BenchmarkError(str(error)) from error

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
                near = difflib.get_close_matches(name, cls.options, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                listed = ", ".join(cls.options) or "none"
                raise BenchmarkError(f"{cls.kind}: unknown option {name!r}; {hint}valid: {listed}")
            try:
                values[name] = cls.options[name].read(str(value))
            except ValueError as error:
                raise BenchmarkError(f"{cls.kind}: option {name!r}: {error}") from error
        return values


def _also(names: Sequence[str]) -> str:
    return f" (nor {', '.join(names)})" if names else ""


def value_of(row: Mapping[str, Any], names: str | Sequence[str], where: str) -> Any:
    """A required field of a row, under the first of several names that is there.

    Raises:
      BenchmarkError: it is missing; names the row.
    """
    for name in [names] if isinstance(names, str) else names:
        if row.get(name) is not None:
            return row[name]
    wanted = names if isinstance(names, str) else " or ".join(names)
    raise BenchmarkError(f"{where}: a row has no {wanted!r}; it has {', '.join(sorted(row))}")


def lettered(options: Sequence[str], form: str = "{}. {}") -> str:
    """Options one per line with their letters.

    Example:
        >>> lettered(["cat", "dog"], "({}) {}")
        '(A) cat\\n(B) dog'
    """
    return "\n".join(form.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))


def coco_file(image_id: int | str, split: str) -> str:
    """The file name of a COCO picture.

    Example:
        >>> coco_file(42, "val2014"), coco_file(42, "val2017")
        ('COCO_val2014_000000000042.jpg', '000000000042.jpg')
    """
    prefix = "" if split == "val2017" else f"COCO_{split}_"
    return f"{prefix}{int(image_id):012d}.jpg"


def clean_id(text: str) -> str:
    """A text as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
