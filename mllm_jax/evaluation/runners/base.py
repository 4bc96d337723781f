"""What a benchmark is when a model answers it: prompts, how an answer is read, and how answers are scored.

Adding one is one file with a `Runner`, a row in `runners.RUNNERS` and a test.
"""

import abc
import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mllm_jax.data.reading import DataError, read_image_file, read_json_rows
from mllm_jax.inference.beam_sampling import Sampling

MAIN, OPEN = "main", "open"


class BenchmarkError(ValueError):
    """A benchmark that cannot be asked; the message names file and question."""


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One prompt.

    Attributes:
      row: what is kept with the answer; holds `question_id`, further `rotation` where a question is asked
        several times, and what the scorer needs.
      prompt: the words behind the pictures.
      images: names that `Runner.read_image` understands.
      options: multiple choice: the possible answers, in the order of the prompt.
      part: "main", or "open" for the same questions asked without options.
      interleaved: pictures stand where the prompt says `<image>`, not before it.
    """

    row: dict[str, Any]
    prompt: str
    images: tuple[str, ...]
    options: tuple[str, ...] = ()
    part: str = MAIN
    interleaved: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Which answer of its part this is."""
        return key_of(self.row)


def key_of(row: dict[str, Any]) -> tuple[str, int]:
    """`(question_id, rotation)` of a row of predictions."""
    return str(row["question_id"]), int(row.get("rotation") or 0)


class Runner(abc.ABC):
    """A benchmark read from its files.

    Attributes:
      questions: all prompts; those about one picture stand together.
      kind: the row of the table it belongs to.
      baselines: whether blind answers and the majority answer say something about it.
      max_new_tokens: the official limit of an answer; 0 = the evaluation's.
    """

    kind: ClassVar[str]
    baselines: bool = True
    max_new_tokens: ClassVar[int] = 0

    @property
    def sampling(self) -> Sampling | None:
        """How answers are drawn; None: greedy."""
        return None

    def __init__(self, path: str | Path, images: str | Path | None = None):
        """Takes the benchmark's JSON file and the folder of its images (default: `images` beside it)."""
        self.path = Path(path)
        self.images = Path(images) if images else self.path.parent / "images"
        self._take(self.read())

    def _take(self, questions: Sequence[Question]) -> None:
        """Keeps the prompts, after a look at their ids."""
        self.questions = questions
        if not self.questions:
            raise BenchmarkError(f"{self.path}: holds no question")
        seen: set[tuple[str, str, int]] = set()
        for question in self.questions:
            if (key := (question.part, *question.key)) in seen:
                raise BenchmarkError(f"{self.path}: question id {question.row['question_id']!r} occurs twice")
            seen.add(key)

    @abc.abstractmethod
    def read(self) -> list[Question]:
        """The prompts.

        Raises:
          BenchmarkError: the file cannot be used.
        """

    @abc.abstractmethod
    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        """The answer that a text gives (None if it gives none) and how it was read."""

    def final(self, question: Question, text: str, parsed: str | None) -> dict[str, Any]:
        """Further fields of the stored answer, where a scorer wants them."""
        return {}

    @abc.abstractmethod
    def is_right(self, row: dict[str, Any]) -> bool | None:
        """Whether an answered row is right; None where there is no right answer."""

    @abc.abstractmethod
    def score(self, part: str, predictions: Path) -> dict[str, Any] | None:
        """The score contract's object for a file of answers; None if the benchmark has no score."""

    def majority(self, questions: Sequence[Question]) -> list[str]:
        """What the majority baseline answers to each prompt."""
        raise BenchmarkError(f"the benchmark {self.kind!r} has no majority answer")

    def read_image(self, name: str) -> bytes:
        """The encoded picture.

        Raises:
          DataError: it cannot be read; names the file and a question about it.
        """
        return read_image_file(self.images, name, self.question_about(name))

    def question_about(self, image: str) -> str:
        """The id of the first question about a picture, for messages."""
        return self._questions.get(image, image)

    @functools.cached_property
    def _questions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for question in self.questions:
            for image in question.images:
                found.setdefault(image, str(question.row["question_id"]))
        return found

    @property
    def fingerprint(self) -> str:
        """A digest of all prompts, images' names and expected answers."""
        digest = hashlib.sha256()
        for question in self.questions:
            digest.update(
                json.dumps(
                    [question.part, question.row, question.prompt, question.images, question.options],
                    sort_keys=True,
                ).encode()
            )
        return digest.hexdigest()[:16]


def read_list(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON list (or of JSON lines).

    Raises:
      BenchmarkError: no such file, no JSON, no list, or an entry that is no object.
    """
    try:
        rows = read_json_rows(path)
    except DataError as error:
        raise BenchmarkError(str(error)) from error
    if not isinstance(rows, list):
        raise BenchmarkError(f"{path}: expected a list of questions, found one {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{path}: entry #{index} is no JSON object but {type(row).__name__}")
    return rows


def field(row: dict[str, Any], name: str, kind: type, path: Path, index: int) -> Any:
    """A required field of an entry; a `question_id` may be a string or an integer.

    Raises:
      BenchmarkError: it is missing or of another type; names the entry.
    """
    if not isinstance(row.get(name), (str, int) if name == "question_id" else kind):
        which = row.get("question_id", f"#{index}")
        hint = "; this is training data, questions are written otherwise" if "conversations" in row else ""
        raise BenchmarkError(
            f"{path}: entry {which!r}: {name!r} must be a {kind.__name__}, found {row.get(name)!r}{hint} "
            "(docs/data.md, Questions to answer)"
        )
    return row[name]


def image_names(row: dict[str, Any], path: Path, index: int) -> tuple[str, ...]:
    """`image`: one name, a list of names, or absent.

    Raises:
      BenchmarkError: something else.
    """
    value = row.get("image")
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        which = row.get("question_id", f"#{index}")
        raise BenchmarkError(f"{path}: entry {which!r}: 'image' must be a file name or a list of them")
    return tuple(names)


def most_frequent(answers: Sequence[str]) -> list[str]:
    """Different answers, the most frequent first, ties in alphabetical order."""
    counts = Counter(answers)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))
