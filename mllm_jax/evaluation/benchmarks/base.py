"""What a benchmark is: its questions, how answers to them are read, and one rule for what each answer earns.

The score and what a report marks as right come from the same `Benchmark.grade`.
"""

import abc
import dataclasses
import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from mllm_jax.data.conversations import IMAGE, VIDEO
from mllm_jax.data.reading import read_image_file, safe_path
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.judged import Files, Judged, JudgeTask
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Problems, Row
from mllm_jax.evaluation.store import Key, key_of
from mllm_jax.inference.beam_sampling import BeamSampling
from mllm_jax.storage import Path, as_path

MAIN, OPEN = "main", "open"
IMAGES, VIDEOS = "images", "videos"
# What files with other types or fields than they should have lead to.
UNUSABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class Unanswered(Exception):
    """What is stored for a question is no answer to it; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One prompt.

    Attributes:
      row: what is kept with the answer; holds `question_id`, further `rotation` where a question is asked
        several times, and what the scorer needs.
      prompt: the words behind the images.
      images: names that `Benchmark.read_image` understands, or the one name of a video (`Benchmark.video_file`).
      medium: "images" or "videos", which `images` names.
      segment: of a video, from where to where it is shown: whole numbers count frames, others seconds.
      options: multiple choice: the possible answers, in the order of the prompt.
      part: "main", or "open" for the same questions asked without options.
      interleaved: images stand where the prompt says `<image>`, not before it.
    """

    row: dict[str, Any]
    prompt: str
    images: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    part: str = MAIN
    interleaved: bool = False
    medium: str = IMAGES
    segment: tuple[int | float, int | float] | None = None

    @property
    def key(self) -> Key:
        """Which answer of its part this is."""
        return key_of(self.row)


class Benchmark(abc.ABC):
    """One benchmark.

    The class scores files of answers (`score`); an instance holds the questions that a model is asked.

    Attributes:
      name: exact name, the row of the table.
      unit: of the headline score: `fraction`, `percent` or `points`.
      rule: whose scoring rule is followed.
      answers_format: what a file of answers looks like, one sentence for the help text.
      annotations_format: the same for the annotations; "" if they may be absent, as the answers carry them.
      score_options: names of the keyword options of `score`.
      id_keys: keys that may hold a question's id, the first that is there is taken.
      text_keys: the same for the answer.
      stores_text: whether what is stored are answers in words, not grades or judgements.
      keyed: whether files may be JSON objects id -> answer (or annotation) as well as rows.
      rows_key: where the rows are if the annotations are one JSON object that holds them.
      parts: name of a part -> stem of its file, where the answers (and annotations) are a folder of files.
      in_annotation_order: whether answers are gone through in the annotations' order: last digits depend on it.
      annotations_name: of the file of right answers that is written beside our own answers; "" if they carry them.
      not_asked: why models cannot be asked; "" if they can.
      not_scored: why answers have no score; "" if they do.
      judge: what a GPT model decides (`mllm-jax judge`).
      max_new_tokens: the official limit of an answer; 0 = the evaluation's.
      questions: all prompts; those about one image stand together.
      listed: the same with what cannot be asked here.
      has_baselines: whether blind answers and the majority answer say something about it.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "fraction"
    rule: ClassVar[str] = ""
    answers_format: ClassVar[str] = "JSON lines {question_id, text}"
    annotations_format: ClassVar[str] = ""
    score_options: ClassVar[tuple[str, ...]] = ()
    id_keys: ClassVar[tuple[str, ...]] = ("question_id", "id")
    text_keys: ClassVar[tuple[str, ...]] = ("text", "answer")
    stores_text: ClassVar[bool] = True
    keyed: ClassVar[bool] = False
    rows_key: ClassVar[str] = ""
    parts: ClassVar[Mapping[str, str]] = {}
    in_annotation_order: ClassVar[bool] = False
    annotations_name: ClassVar[str] = ""
    not_asked: ClassVar[str] = ""
    not_scored: ClassVar[str] = ""
    judge: ClassVar[tuple[JudgeTask, ...]] = ()
    max_new_tokens: ClassVar[int] = 0
    has_baselines: bool = True

    # --- scoring files of answers ---------------------------------------------------------------------------------

    @classmethod
    def score(cls, predictions: Path, annotations: Path | None = None, **options: Any) -> dict[str, Any]:
        """The score contract's object (see `predictions.score_result`) for a file of answers.

        Args:
          predictions, annotations: files, or folders where the benchmark has several.
          **options: those that `mllm-jax score` has for this benchmark.

        Raises:
          ValueError: there is no score, an option that this benchmark does not have, or annotations are missing.
          PredictionError: a file that cannot be read at all.

        Examples:
          >>> import pathlib, tempfile
          >>> from mllm_jax.evaluation.benchmarks import get_benchmark
          >>> folder = pathlib.Path(tempfile.mkdtemp())
          >>> answers, gold = folder / "answers.jsonl", folder / "gold.jsonl"
          >>> answers.write_text('{"question_id": "1", "text": "A bus."}') > 0
          True
          >>> gold.write_text('{"question_id": "1", "answer": "bus"}') > 0
          True
          >>> found = get_benchmark("vqa").score(answers, gold)
          >>> found["score"], found["n"], found["complete"]
          (1.0, 1, True)
        """
        if cls.not_scored:
            raise ValueError(f"{cls.name}: {cls.not_scored}")
        for key in options:
            if key not in cls.score_options:
                raise ValueError(f"{cls.name}: no option {key!r}; it has {list(cls.score_options)}")
        if cls.annotations_format and annotations is None:
            raise ValueError(f"{cls.name}: --annotations is needed: {cls.annotations_format}")
        predictions, problems = as_path(predictions), Problems()
        annotations = None if annotations is None else as_path(annotations)
        try:
            result = cls._result(predictions, annotations, problems, options)
            json.dumps(result, allow_nan=False)
        except UNUSABLE as error:
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            files = [str(path) for path in (predictions, annotations) if path is not None]
            if not any(file in said for file in files):
                said = f"{' with '.join(files)}: cannot be scored: {said}"
            raise PredictionError(said) from error
        return result

    @classmethod
    def _result(
        cls, predictions: Path, annotations: Path | None, problems: Problems, options: Row
    ) -> dict[str, Any]:
        answers = cls.grade_files(predictions, annotations, problems)
        scale = 100 if cls.unit == "percent" else 1
        figures = {"n": len(answers), "unparsed": answers.unread, "score": answers.mean(scale=scale)}
        figures |= {"subtasks": answers.rates(scale=scale), "groups": {}} | cls.figures(answers, **options)
        return reading.score_result(cls.name, unit=cls.unit, problems=problems, **figures)

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        """The answers of a file, or of a folder with a file for each of `parts`, with what each earns.

        Raises:
          PredictionError: there is none.
        """
        if cls.parts:
            return cls._grade_parts(predictions, annotations, problems)
        gold = None if annotations is None else cls.read_annotations(annotations)
        rows = cls.read_answers(predictions, problems)
        return cls.match(rows, gold, predictions, annotations, problems)

    @classmethod
    def _grade_parts(cls, folder: Path, annotations: Path | None, problems: Problems) -> Answers:
        answers = Answers()
        for part, stem in cls.parts.items():
            path = find_file(folder, stem)
            if path is None:
                problems.add("missing", f"{stem}.json")
                continue
            gold = None
            if annotations is not None:
                if (right := find_file(annotations, stem)) is None:
                    raise PredictionError(f"{annotations}: no {stem}.json (or .jsonl) with annotations")
                gold = cls.read_annotations(right)
            found = cls.match(cls.read_answers(path, problems), gold, path, annotations, problems)
            for answer in found:
                answer.part = part
            answers += found
        if not answers:
            stems = ", ".join(cls.parts.values())
            raise PredictionError(f"{folder}: give the folder with {stems} (.json or .jsonl)")
        return answers

    @classmethod
    def match(
        cls,
        rows: Sequence[Row],
        gold: Mapping[Any, Row] | None,
        predictions: Path,
        annotations: Path | None,
        problems: Problems,
    ) -> Answers:
        """Graded answers to the annotated questions; what does not belong together goes to `problems`."""
        found = cls.find(rows, gold, predictions, problems)
        keys = [key for key in gold if key in found] if gold and cls.in_annotation_order else list(found)
        answers = Answers()
        for key in keys:
            item = found[key] if gold is None else cls.item(found[key], gold[key])
            value = cls.stored(found[key], f"{predictions}: {key}")
            text = reading.answer_text(value) if cls.stores_text else ""
            if text is None:
                problems.add("unusable_answer", f"{key}: {value!r:.60} is no text")
                text = ""
            answer = Answer(key, found[key], item, text, f"{annotations or predictions}: {key}")
            answer.parsed = bool(text.strip()) or not cls.stores_text
            try:
                cls.grade(answer)
                answers.append(answer)
            except Unanswered as error:
                problems.add("missing", f"{predictions.name}: {key}: {error}")
            except BenchmarkError:
                raise
            except UNUSABLE as error:
                said = f"{type(error).__name__}: {error}"
                raise PredictionError(f"{answer.where}: cannot be graded: {said}") from error
        return answers

    @classmethod
    def find(
        cls, rows: Iterable[Row], gold: Iterable[Hashable] | None, predictions: Path, problems: Problems
    ) -> dict[Any, Row]:
        """One row per annotated question; see `predictions.match_ids`."""
        where = str(predictions)
        identify = cls.identifier(gold, predictions)
        return reading.match_ids(rows, gold, identify, lambda row: cls.stored(row, where), problems)

    @classmethod
    def read_annotations(cls, path: Path) -> Mapping[Any, Row]:
        """id -> annotation.

        Raises:
          PredictionError: the file cannot be used.
        """
        value = reading.read_annotations(path)
        if isinstance(value, dict) and cls.rows_key in value:
            value = value[cls.rows_key]
            if not isinstance(value, list):
                raise PredictionError(f"{path}: expected a list of annotations under {cls.rows_key!r}")
        if not cls.keyed:
            return reading.by_id(value if isinstance(value, list) else [value], cls.id_keys, path)
        return reading.by_id(cls._rows_of_map(value, "answer", path), cls.id_keys[:1], path)

    @classmethod
    def read_answers(cls, path: Path, problems: Problems) -> list[dict[str, Any]]:
        """The rows of a file of answers."""
        if not cls.keyed:
            return reading.read_rows(path, problems)
        return cls._rows_of_map(reading.read_json(path, problems), cls.text_keys[0], path, problems)

    @classmethod
    def _rows_of_map(
        cls, value: Any, key: str, path: Path, problems: Problems | None = None
    ) -> list[dict[str, Any]]:
        """Rows of an object id -> row, or id -> value, which becomes the row's `key`."""
        pairs = reading.entries(value, cls.id_keys, path, problems)
        return [{**(v if isinstance(v, dict) else {key: v}), cls.id_keys[0]: number} for number, v in pairs]

    @classmethod
    def identifier(cls, gold: Any, path: Path) -> Callable[[Row], Hashable]:
        """A function from a row of the answer file to its question's id; `gold`: the annotations by id, or None."""
        return lambda row: str(reading.take(row, cls.id_keys, str(path)))

    @classmethod
    def stored(cls, row: Row, where: str) -> Any:
        """The answer in a row of the answer file."""
        return reading.take(row, cls.text_keys, where)

    @classmethod
    def item(cls, row: Row, annotation: Row) -> Row:
        """What is known of a question that has an annotation."""
        return annotation

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        """The answer that a text gives (None if it gives none) and how it was read.

        Args:
          item: what is known of the question: the annotation, or the stored row of a question that is asked.
        """
        return (text, "text") if text.strip() else (None, "unparsed")

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """Sets `credit`, `parsed` and `part`: the one rule for what an answer earns.

        Raises:
          Unanswered: it leaves the question without an answer.
        """
        raise NotImplementedError

    @classmethod
    def figures(cls, answers: Answers, **options: Any) -> dict[str, Any]:
        """Further figures, where there are.

        Also `score`, `n`, `unparsed`, `subtasks` and `groups` where they are not the mean credit (in percent or as a
        fraction), the number of answers and of those that no rule could read, the parts' mean credits, and none.
        """
        return {}

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        """Writes a judge's replies in the form that `score` reads.

        Args:
          folder: where to.
          judged: a request and its reply for each question and run.
          said: the judged answers, and their annotations or None.

        Returns:
          What `score` takes: the judgements, and their annotations or None.
        """
        raise NotImplementedError

    @classmethod
    def credits_in(cls, predictions: Path, annotations: Path | None) -> dict[Key, float]:
        """What each answer of a file earns in the score; empty where single answers earn nothing."""
        if cls.not_scored:
            return {}
        answers = cls.grade_files(predictions, annotations, Problems())
        return {key_of(answer.row): float(answer.credit) for answer in answers}

    @classmethod
    def counted_as(cls, row: Row) -> Hashable:
        """Answers for which this is equal count as one question, right only if all are."""
        return key_of(row)

    # --- asking ---------------------------------------------------------------------------------------------------

    def __init__(self, path: str | Path, images: str | Path | None = None):
        """Takes the benchmark's JSON file and the folder of its media (default: `images` and `videos` beside it)."""
        self.path = as_path(path)
        self.images = as_path(images) if images else self.path.parent / IMAGES
        self.videos = as_path(images) if images else self.path.parent / VIDEOS
        self.listed = self.read()
        self.set_questions(self.listed)

    def set_questions(self, questions: Sequence[Question]) -> None:
        """Keeps the prompts, after a look at their ids and at marks that would be read as text."""
        self.questions = questions
        if not self.questions:
            raise BenchmarkError(f"{self.path}: holds no question")
        seen: set[tuple[str, str, int]] = set()
        for question in self.questions:
            if (key := (question.part, *question.key)) in seen:
                raise BenchmarkError(f"{self.path}: question id {question.row['question_id']!r} occurs twice")
            seen.add(key)
            marks = () if question.interleaved else (IMAGE, VIDEO) if question.medium == VIDEOS else (IMAGE,)
            if mark := next((mark for mark in marks if mark in question.prompt), ""):
                raise BenchmarkError(
                    f"{self.path}: question {question.row['question_id']!r} holds {mark}, the mark of training data; "
                    f"{question.medium} are shown before the question, so take the mark (and the line break behind it) "
                    "out"
                )

    def read(self) -> list[Question]:
        """The prompts.

        Raises:
          BenchmarkError: the file cannot be used.
        """
        raise NotImplementedError

    @property
    def sampling(self) -> BeamSampling | None:
        """How answers are drawn; None: greedy."""
        return None

    def extra_fields(self, text: str, parsed: str | None) -> dict[str, Any]:
        """Further fields of a stored answer, where a scorer wants them."""
        return {}

    def answer_row(
        self, question: Question, text: str, read: tuple[str | None, str] | None = None
    ) -> dict[str, Any]:
        """An answer as it is stored; `read` instead of what `parse` says."""
        item = {"options": question.options} | question.row | question.row.get("truth", {})
        parsed, how = self.parse(text, item) if read is None else read
        row = question.row | {"prompt": question.prompt, "text": text, "parsed": parsed, "how": how}
        return row | self.extra_fields(text, parsed)

    def annotations_for(self, predictions: Path) -> Path | None:
        """The annotations of a file of our own answers; None if the answers carry them."""
        return None

    def score_answers(self, predictions: Path) -> dict[str, Any] | None:
        """The score contract's object for a file of our own answers; None if there is no score."""
        return None if self.not_scored else self.score(predictions, self.annotations_for(predictions))

    def credits(self, predictions: Path) -> dict[Key, float]:
        """What each of our own answers earns in the score; empty where there is none."""
        return self.credits_in(predictions, self.annotations_for(predictions))

    def majority(self, questions: Sequence[Question]) -> list[str]:
        """The majority baseline: per ability the most frequent right answer that a question's options offer."""
        answers: dict[str, list[str]] = defaultdict(list)
        for question in self.counted_questions():
            row = question.row
            gold = row["gold"] if "gold" in row else row["answer"]
            answers[row.get("ability", "")].append(most_frequent(gold)[0] if isinstance(gold, list) else gold)
        ranked = {ability: most_frequent(texts) for ability, texts in answers.items()}
        found = []
        for question in questions:
            order = ranked[question.row.get("ability", "")]
            offered = [a for a in order if a in question.options] if question.options else order
            found.append((offered or list(question.options))[0])
        return found

    def counted_questions(self) -> Iterable[Question]:
        """The questions whose right answers the majority baseline counts."""
        return self.questions

    def read_image(self, name: str) -> bytes:
        """The encoded image.

        Raises:
          DataError: it cannot be read; names the file and a question about it.
        """
        return read_image_file(self.images, name, self.question_about(name))

    def image_file(self, name: str) -> Path | None:
        """Where an image is; None where it is inside a table."""
        return self.images / name

    def video_file(self, name: str) -> Path:
        """Where a video is: a file, or a folder of frames.

        Raises:
          DataError: a path that leaves the folder of videos.
        """
        return safe_path(self.videos, name)

    def question_about(self, image: str) -> str:
        """The id of the first question about an image, for messages."""
        return self._first_question.get(image, image)

    @functools.cached_property
    def _first_question(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for question in self.questions:
            for image in question.images:
                found.setdefault(image, str(question.row["question_id"]))
        return found

    def unasked(self) -> dict[str, Any]:
        """Further entries of `scores.json`: what could not be asked; nothing if all could."""
        return {}

    @property
    def fingerprint(self) -> str:
        """A digest of all prompts, images' names and expected answers."""
        digest = hashlib.sha256()
        for q in self.listed:
            digest.update(json.dumps([q.part, q.row, q.prompt, q.images, q.options], sort_keys=True).encode())
        return digest.hexdigest()[:16]


def find_file(folder: Path, stem: str) -> Path | None:
    """The file of JSON or JSON lines of that name, if there is one."""
    places = (folder / f"{stem}.json", folder / f"{stem}.jsonl")
    return next((place for place in places if place.is_file()), None)


def most_frequent(answers: Sequence[str]) -> list[str]:
    """Different answers, the most frequent first, ties in alphabetical order."""
    counts = Counter(answers)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))
