"""Asks a model a benchmark's questions and keeps every answer; a stopped run goes on where it was.

A folder holds one benchmark's answers by one model:

    manifest.json       whose answers these are
    predictions.jsonl   the model's answers          predictions_open.jsonl   the same questions without options
    single_frame.jsonl  shown one frame of a video   single_frame_open.jsonl
    blind.jsonl         the model without images     blind_open.jsonl
    majority.jsonl      the majority answer          majority_open.jsonl
    likelihood.jsonl    the option that the model finds likeliest
    scores.json         what the scorers say of these files
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mllm_jax import files
from mllm_jax.console import progress_bar
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import IMAGE, SampleError, Turn, render
from mllm_jax.data.tokens import encode_prompt, encode_sample
from mllm_jax.evaluation.benchmarks.base import MAIN, OPEN, VIDEOS, Benchmark, Question
from mllm_jax.evaluation.media import BLIND, PREDICTIONS, SINGLE_FRAME, Media, watching
from mllm_jax.evaluation.store import AnswerFile, StoreError, check_manifest
from mllm_jax.inference.batching import DEFAULT_BUCKETS, Request
from mllm_jax.inference.generate import generate
from mllm_jax.inference.likelihood import option_log_likelihoods
from mllm_jax.inference.model import Model
from mllm_jax.parallel import endings, processes
from mllm_jax.storage import Path

Rows = Iterator[dict[str, Any]]
OnBatch = Callable[[int], None]  # takes how many questions are answered
MAJORITY, LIKELIHOOD = "majority", "likelihood"
CONDITIONS = (PREDICTIONS, SINGLE_FRAME, BLIND, MAJORITY, LIKELIHOOD)
MEETING = 64  # answers after which the processes of a run make sure that all of them have been written


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is asked; only `max_new_tokens`, `overlong` and `video` can change an answer.

    Attributes:
      max_new_tokens: at most so many tokens per answer.
      overlong: what becomes of a prompt that does not fit the LLM's context together with `max_new_tokens`: "error", or
        "empty": the answer is empty, its row says `too_long`, and the scorer counts it as an empty answer.
      video: how videos are read, where not as the model does or as in Dense Connector; see `Model.with_video`.
      batch_size: prompts at once.
      buckets: lengths to which what follows an image is padded.
      threads: threads that decode images.
    """

    max_new_tokens: int = 16
    overlong: str = "error"
    video: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    threads: int = 4


def answers_file(directory: Path, condition: str, part: str) -> Path:
    """Where the answers of a part under a condition are kept."""
    return directory / (f"{condition}.jsonl" if part == MAIN else f"{condition}_{part}.jsonl")


def answer_benchmark(
    model: Model,
    benchmark: Benchmark,
    directory: Path,
    settings: Settings,
    *,
    name: str,
    blind: bool = True,
    likelihood: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Asks everything that is not answered yet, then scores.

    Args:
      name: the benchmark's, for the progress bar.
      blind: also without images, of videos with a single frame, and the majority answer.
      likelihood: multiple choice also by the options' likelihood.

    Returns:
      The contents of `scores.json`: the score contract's object for the model's answers and, under `blind`,
      `single_frame`, `majority`, `likelihood` and `open` (with the conditions inside), those of the other files.

    Raises:
      StoreError: the folder holds answers of another model, benchmark or setting, or the processes do not see the same.
      DataError, ImageError: an image that cannot be used.
      SampleTooLong: a prompt that does not fit the LLM's context.
    """
    identity = {
        "kind": benchmark.name,
        "benchmark": benchmark.fingerprint,
        "model": model.fingerprint,
        "template": model.template,
        "max_new_tokens": settings.max_new_tokens,
    }
    if settings.overlong not in ("error", "empty"):
        raise ValueError(f"overlong={settings.overlong!r} must be 'error' or 'empty'")
    if settings.overlong != "error":
        identity["overlong"] = settings.overlong
    if benchmark.sampling is not None:
        identity["sampling"] = dataclasses.asdict(benchmark.sampling)
    videos = [question.medium == VIDEOS for question in benchmark.questions]
    if any(videos):
        model = watching(model, benchmark, settings.video)
        identity["video"] = dataclasses.asdict(model.config.video)
    with processes.together("manifest checked"):
        if _is_first_process():
            check_manifest(directory, identity)
    asking = _Asking(model, benchmark, directory, settings, name, console)
    asking.generate(PREDICTIONS)
    if blind and benchmark.has_baselines:
        if all(videos):
            asking.generate(SINGLE_FRAME)
        asking.generate(BLIND)
    if likelihood and any(question.options for question in benchmark.questions):
        asking.compare_options()
    scores: dict[str, Any] = {}
    with processes.together("answers scored"):
        if _is_first_process():
            if blind and benchmark.has_baselines:
                answer_by_majority(benchmark, directory)
            scores = score_files(benchmark, directory)
            files.write_json(directory / "scores.json", scores)
    return scores


@dataclasses.dataclass(frozen=True)
class _Asking:
    """A model that answers a benchmark's questions; the attributes are `answer_benchmark`'s arguments."""

    model: Model
    benchmark: Benchmark
    directory: Path
    settings: Settings
    name: str
    console: Console | None

    def generate(self, condition: str) -> None:
        """Generates the answers that are missing in a condition's files."""
        model, settings = self.model, self.settings
        template = resolve_template(model.template, model.tokenizer)
        media = Media(model, self.benchmark, condition)

        def request(question: Question) -> Request:
            which, turns = str(question.row["question_id"]), [question_turn(question)]
            found = media.layouts(question)
            prompt = encode_prompt(template, turns, model.tokenizer, found, sample=which)
            return Request(which, prompt, media.keys(question))

        def fits(question: Question) -> bool:
            if settings.overlong == "error":  # found out by `generate`, without encoding twice
                return True
            return len(request(question).prompt) + settings.max_new_tokens <= model.config.llm.max_positions

        def answers(questions: Sequence[Question], on_batch: OnBatch) -> Rows:
            fitting = [fits(question) for question in questions]
            ids, stop_text = model.stops
            found = generate(
                model.config,
                model.params,
                (request(question) for question, fit in zip(questions, fitting, strict=True) if fit),
                model.tokenizer,
                load_image=media.load,
                max_new_tokens=settings.max_new_tokens,
                stop_ids=ids,
                stop_text=stop_text,
                on_batch=on_batch,
                sampling=self.benchmark.sampling,
                **self._batching,
            )
            for question, fit in zip(questions, fitting, strict=True):
                if fit:
                    one = next(found)
                    row = self.benchmark.answer_row(question, one.text)
                    yield row | {"stopped": one.stopped, "new_tokens": len(one.tokens)}
                else:
                    on_batch(1)
                    row = self.benchmark.answer_row(question, "", (None, "too_long"))
                    yield row | {"stopped": False, "new_tokens": 0}

        title = self.name if condition == PREDICTIONS else f"{self.name}, {condition.replace('_', ' ')}"
        self._append_missing(self.benchmark.questions, condition, title, answers)

    def compare_options(self) -> None:
        """Answers multiple choice by the likeliest option, in `likelihood.jsonl`."""
        model = self.model
        template = resolve_template(model.template, model.tokenizer)
        media = Media(model, self.benchmark)

        def requests(questions: Sequence[Question]) -> Iterator[list[Request]]:
            for question in questions:
                found, which = media.layouts(question), str(question.row["question_id"])
                options = []
                for option in question.options:
                    turns = [question_turn(question), Turn("gpt", (option,))]
                    spans = render(template, turns, sample=which)
                    sample = encode_sample(spans, model.tokenizer, found, sample=which)
                    options.append(Request(which, sample, media.keys(question)))
                yield options

        def answers(questions: Sequence[Question], on_batch: OnBatch) -> Rows:
            found = option_log_likelihoods(
                model.config,
                model.params,
                requests(questions),
                load_image=media.load,
                **self._batching,
            )
            for question, scores in zip(questions, found, strict=True):
                best = question.options[int(np.argmax(scores))]
                on_batch(1)
                row = self.benchmark.answer_row(question, best, (best, LIKELIHOOD))
                yield row | {"log_likelihoods": scores}

        questions = [question for question in self.benchmark.questions if question.options]
        self._append_missing(questions, LIKELIHOOD, f"{self.name}, likelihood", answers)

    @property
    def _batching(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in ("batch_size", "buckets", "threads")}

    def _append_missing(
        self,
        questions: Sequence[Question],
        condition: str,
        title: str,
        answers: Callable[[Sequence[Question], OnBatch], Rows],
    ) -> None:
        """Appends the missing answers to a condition's files, with a progress bar.

        Raises:
          StoreError: the processes do not find the same answers missing, so they would not compute the same batches.
        """
        writes = _is_first_process()
        with processes.together(f"{condition} read"):
            stores = {
                part: AnswerFile(answers_file(self.directory, condition, part), writable=writes)
                for part in dict.fromkeys(question.part for question in questions)
            }
        left = [question for question in questions if question.key not in stores[question.part].rows]
        if not processes.same(repr([(question.part, question.key) for question in left]).encode()):
            error = StoreError(
                f"{self.directory}: the processes of this run do not find the same {condition} answers there (process "
                f"{jax.process_index()} has {len(left)} of {len(questions)} left); all hosts must see one folder, and "
                "the same files of the benchmark: move the first host's folder, which holds the answers, to a shared "
                "disk and give that as --out (train.py: --workdir), or start anew in a folder there"
            )
            raise endings.agreed(error)
        with contextlib.ExitStack() as stack:
            for store in stores.values():
                stack.enter_context(store)
            progress = stack.enter_context(progress_bar(self.console, show=writes))
            task = progress.add_task(title, total=len(questions), completed=len(questions) - len(left))
            rows = answers(left, lambda count: progress.advance(task, count))
            late = processes.Postponed()
            for number, (question, row) in enumerate(zip(left, rows, strict=True), 1):
                with late:  # only the first one writes; the others are about to compute the next batch
                    stores[question.part].append(row)
                if number % MEETING == 0 or number == len(left):
                    late.meet(f"{condition} written")


def answer_by_majority(benchmark: Benchmark, directory: Path) -> None:
    """Writes the majority baseline's answers."""
    for part in _parts(benchmark):
        questions = [question for question in benchmark.questions if question.part == part]
        path = answers_file(directory, MAJORITY, part)
        path.unlink(missing_ok=True)  # a pure function of the benchmark
        with AnswerFile(path) as file:
            for question, text in zip(questions, benchmark.majority(questions), strict=True):
                file.append(benchmark.answer_row(question, text))


def score_files(benchmark: Benchmark, directory: Path) -> dict[str, Any]:
    """Scores every file of answers in a folder; see `answer_benchmark`."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for condition in CONDITIONS:
        for part in _parts(benchmark):
            path = answers_file(directory, condition, part)
            if path.exists() and (result := benchmark.score_answers(path)) is not None:
                found[condition, part] = result
    if (PREDICTIONS, MAIN) not in found:  # a benchmark to look at
        rows = AnswerFile(answers_file(directory, PREDICTIONS, MAIN), writable=False).rows.values()
        unparsed = sum(row["parsed"] is None for row in rows)
        empty: dict[str, Any] = {"score": None, "subtasks": {}, "groups": {}}
        scores = {"benchmark": benchmark.name, "n": len(rows), "unparsed": unparsed} | empty
        return scores | benchmark.unasked()
    scores = dict(found[PREDICTIONS, MAIN]) | benchmark.unasked()
    scores |= {c: found[c, MAIN] for c in CONDITIONS[1:] if (c, MAIN) in found}
    if (PREDICTIONS, OPEN) in found:
        scores["open"] = {c: found[c, OPEN] for c in CONDITIONS if (c, OPEN) in found}
    return scores


def question_turn(question: Question) -> Turn:
    """The human turn: images first, then the words on a new line; or images where the words mention them.

    Raises:
      SampleError: an interleaved prompt with more or fewer places than images.
    """
    if not question.images:
        return Turn("human", (question.prompt,))
    if question.interleaved:
        parts = tuple(question.prompt.split(IMAGE))
        if len(parts) != len(question.images) + 1:
            which = str(question.row["question_id"])
            raise SampleError(which, f"{len(parts) - 1} places for {len(question.images)} images")
        return Turn("human", parts)
    return Turn("human", (*[""] * len(question.images), f"\n{question.prompt}"))


def _parts(benchmark: Benchmark) -> list[str]:
    return list(dict.fromkeys(question.part for question in benchmark.questions))


def _is_first_process() -> bool:
    """Whether this process writes (all processes compute together)."""
    return jax.process_index() == 0
