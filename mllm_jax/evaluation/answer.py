"""Asks a model a benchmark's questions and keeps every answer; a stopped run goes on where it was.

A folder holds one benchmark's answers by one model:

    manifest.json       whose answers these are
    predictions.jsonl   the model's answers          predictions_open.jsonl   the same questions without options
    blind.jsonl         the model without pictures   blind_open.jsonl
    majority.jsonl      the majority answer          majority_open.jsonl
    likelihood.jsonl    the option that the model finds likeliest
    scores.json         what the scorers say of these files
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import IMAGE, SampleError, Turn, render
from mllm_jax.data.span_tokenizer import span_tokenizer
from mllm_jax.data.tokens import encode_prompt, encode_sample, stop_ids
from mllm_jax.evaluation.runners import MAIN, OPEN, Ask, Runner
from mllm_jax.evaluation.store import AnswerFile, StoreError, claim, write_json
from mllm_jax.inference.batching import DEFAULT_BUCKETS, Request
from mllm_jax.inference.generate import generate
from mllm_jax.inference.likelihood import option_log_likelihoods
from mllm_jax.inference.model import Model
from mllm_jax.parallel import processes

PREDICTIONS, BLIND, MAJORITY, LIKELIHOOD = "predictions", "blind", "majority", "likelihood"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is asked; only `max_new_tokens` and `overlong` can change an answer.

    Attributes:
      max_new_tokens: at most so many tokens per answer.
      overlong: what becomes of a prompt that does not fit the LLM's context together with `max_new_tokens`: "error", or
        "empty": the answer is empty, its row says `too_long`, and the scorer counts it as an empty answer.
      batch_size: prompts at once.
      buckets: lengths to which what follows a picture is padded.
      threads: threads that decode pictures.
    """

    max_new_tokens: int = 16
    overlong: str = "error"
    batch_size: int = 16
    buckets: tuple[int, ...] = DEFAULT_BUCKETS
    threads: int = 4


def answers_file(directory: Path, condition: str, part: str) -> Path:
    """Where the answers of a part under a condition are kept."""
    return directory / (f"{condition}.jsonl" if part == MAIN else f"{condition}_{part}.jsonl")


def answer_benchmark(
    model: Model,
    runner: Runner,
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
      blind: also without pictures, and the majority answer.
      likelihood: multiple choice also by the options' likelihood.

    Returns:
      The contents of `scores.json`: the score contract's object for the model's answers and, under `blind`,
      `majority`, `likelihood` and `open` (with the three conditions inside), those of the other files.

    Raises:
      StoreError: the folder holds answers of another model, benchmark or setting, or the processes do not see the same.
      DataError, ImageError: a picture that cannot be used.
      SampleTooLong: a prompt that does not fit the LLM's context.
    """
    identity = {
        "kind": runner.kind,
        "benchmark": runner.fingerprint,
        "model": model.fingerprint,
        "template": model.template,
        "max_new_tokens": settings.max_new_tokens,
    }
    if settings.overlong not in ("error", "empty"):
        raise ValueError(f"overlong={settings.overlong!r} must be 'error' or 'empty'")
    if settings.overlong != "error":
        identity["overlong"] = settings.overlong
    if runner.sampling is not None:
        identity["sampling"] = dataclasses.asdict(runner.sampling)
    if _first():
        claim(directory, identity)
    _meet("claimed")
    ask_model(model, runner, directory, settings, name=name, console=console)
    if blind and runner.baselines:
        ask_model(model, runner, directory, settings, name=name, blind=True, console=console)
    if likelihood and any(ask.options for ask in runner.asks):
        ask_likelihood(model, runner, directory, settings, name=name, console=console)
    scores: dict[str, Any] = {}
    if _first():
        if blind and runner.baselines:
            answer_by_majority(runner, directory)
        scores = score_files(runner, directory)
        write_json(directory / "scores.json", scores)
    _meet("scored")
    return scores


def ask_model(
    model: Model,
    runner: Runner,
    directory: Path,
    settings: Settings,
    *,
    name: str,
    blind: bool = False,
    console: Console | None = None,
) -> None:
    """Generates the answers that are missing in `predictions` (or `blind`) files."""
    condition = BLIND if blind else PREDICTIONS
    template = resolve_template(model.template, model.tokenizer)

    def request(ask: Ask) -> Request:
        counts = [model.config.tokens_per_image] * len(ask.images)
        which = str(ask.row["question_id"])
        prompt = encode_prompt(template, [question_turn(ask)], model.tokenizer, counts, sample=which)
        # Blind, all pictures are the same one.
        return Request(which, prompt, ("",) * len(ask.images) if blind else ask.images)

    def fits(ask: Ask) -> bool:
        if settings.overlong == "error":  # found out by `generate`, without encoding twice
            return True
        return len(request(ask).prompt) + settings.max_new_tokens <= model.config.llm.max_positions

    def answers(asks: Sequence[Ask], on_batch: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        fitting = [fits(ask) for ask in asks]
        ids, stop_text = _stops(model)
        found = generate(
            model.config,
            model.params,
            (request(ask) for ask, fit in zip(asks, fitting, strict=True) if fit),
            model.tokenizer,
            load_image=_loader(model, runner, blind),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            stop_ids=ids,
            stop_text=stop_text,
            buckets=settings.buckets,
            threads=settings.threads,
            on_batch=on_batch,
            sampling=runner.sampling,
        )
        for ask, fit in zip(asks, fitting, strict=True):
            if not fit:
                on_batch(1)
                row = ask.row | {"prompt": ask.prompt, "text": "", "parsed": None, "how": "too_long"}
                yield row | runner.final(ask, "", None) | {"stopped": False, "new_tokens": 0}
                continue
            one = next(found)
            parsed, how = runner.parse(ask, one.text)
            row = ask.row | {"prompt": ask.prompt, "text": one.text, "parsed": parsed, "how": how}
            row |= runner.final(ask, one.text, parsed)
            yield row | {"stopped": one.stopped, "new_tokens": len(one.tokens)}

    _fill(runner.asks, directory, condition, f"{name}{', blind' if blind else ''}", answers, console)


def ask_likelihood(
    model: Model,
    runner: Runner,
    directory: Path,
    settings: Settings,
    *,
    name: str,
    console: Console | None = None,
) -> None:
    """Answers multiple choice by the likeliest option, in `likelihood.jsonl`."""
    template = resolve_template(model.template, model.tokenizer)

    def requests(asks: Sequence[Ask]) -> Iterator[list[Request]]:
        for ask in asks:
            counts = [model.config.tokens_per_image] * len(ask.images)
            which = str(ask.row["question_id"])
            options = []
            for option in ask.options:
                spans = render(template, [question_turn(ask), Turn("gpt", (option,))], sample=which)
                sample = encode_sample(spans, model.tokenizer, counts, sample=which)
                options.append(Request(which, sample, ask.images))
            yield options

    def answers(asks: Sequence[Ask], on_batch: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        found = option_log_likelihoods(
            model.config,
            model.params,
            requests(asks),
            load_image=_loader(model, runner, blind=False),
            batch_size=settings.batch_size,
            buckets=settings.buckets,
            threads=settings.threads,
        )
        for ask, scores in zip(asks, found, strict=True):
            best = ask.options[int(np.argmax(scores))]
            row = ask.row | {"prompt": ask.prompt, "text": best, "parsed": best, "how": LIKELIHOOD}
            row |= runner.final(ask, best, best)
            on_batch(1)
            yield row | {"log_likelihoods": scores}

    asks = [ask for ask in runner.asks if ask.options]
    _fill(asks, directory, LIKELIHOOD, f"{name}, likelihood", answers, console)


def answer_by_majority(runner: Runner, directory: Path) -> None:
    """Writes the majority baseline's answers."""
    for part in _parts(runner):
        asks = [ask for ask in runner.asks if ask.part == part]
        path = answers_file(directory, MAJORITY, part)
        path.unlink(missing_ok=True)  # a pure function of the benchmark
        with AnswerFile(path) as file:
            for ask, text in zip(asks, runner.majority(asks), strict=True):
                parsed, how = runner.parse(ask, text)
                row = ask.row | {"prompt": ask.prompt, "text": text, "parsed": parsed, "how": how}
                file.append(row | runner.final(ask, text, parsed))


def score_files(runner: Runner, directory: Path) -> dict[str, Any]:
    """Scores every file of answers in a folder; see `answer_benchmark`."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for condition in (PREDICTIONS, BLIND, MAJORITY, LIKELIHOOD):
        for part in _parts(runner):
            path = answers_file(directory, condition, part)
            if path.exists() and (result := runner.score(part, path)) is not None:
                found[condition, part] = result
    if (PREDICTIONS, MAIN) not in found:  # a benchmark to look at
        rows = AnswerFile(answers_file(directory, PREDICTIONS, MAIN), writable=False).rows.values()
        unparsed = sum(row["parsed"] is None for row in rows)
        empty: dict[str, Any] = {"score": None, "subtasks": {}, "groups": {}}
        return {"benchmark": runner.kind, "n": len(rows), "unparsed": unparsed} | empty
    scores = dict(found[PREDICTIONS, MAIN])
    scores |= {c: found[c, MAIN] for c in (BLIND, MAJORITY, LIKELIHOOD) if (c, MAIN) in found}
    if (PREDICTIONS, OPEN) in found:
        scores["open"] = {c: found[c, OPEN] for c in (PREDICTIONS, BLIND, MAJORITY) if (c, OPEN) in found}
    return scores


def _fill(
    asks: Sequence[Ask],
    directory: Path,
    condition: str,
    title: str,
    answers: Callable[[Sequence[Ask], Callable[[int], None]], Iterator[dict[str, Any]]],
    console: Console | None,
) -> None:
    """Appends the missing answers to a condition's files, with a progress bar.

    Raises:
      StoreError: the processes do not find the same answers missing, so they would not compute the same batches.
    """
    parts = dict.fromkeys(ask.part for ask in asks)
    files = {part: AnswerFile(answers_file(directory, condition, part), writable=_first()) for part in parts}
    _meet(f"read {condition}")
    left = [ask for ask in asks if ask.key not in files[ask.part].rows]
    if not processes.same(repr([(ask.part, ask.key) for ask in left]).encode()):
        raise StoreError(
            f"{directory}: the processes of this run do not find the same {condition} answers there (process "
            f"{jax.process_index()} has {len(left)} of {len(asks)} left); all hosts must see one folder, and the same "
            "files of the benchmark: move the first host's folder, which holds the answers, to a shared disk and give "
            "that as --out (train.py: --workdir), or start anew in a folder there"
        )
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not _first(),
        refresh_per_second=2,
    )
    try:
        with progress:
            task = progress.add_task(title, total=len(asks), completed=len(asks) - len(left))
            rows = answers(left, lambda count: progress.advance(task, count))
            for ask, row in zip(left, rows, strict=True):
                files[ask.part].append(row)
    finally:
        for file in files.values():
            file.close()


def question_turn(ask: Ask) -> Turn:
    """The human turn: pictures first, then the words on a new line; or pictures where the words mention them.

    Raises:
      SampleError: an interleaved prompt with more or fewer places than pictures.
    """
    if not ask.images:
        return Turn("human", (ask.prompt,))
    if ask.interleaved:
        parts = tuple(ask.prompt.split(IMAGE))
        if len(parts) != len(ask.images) + 1:
            which = str(ask.row["question_id"])
            raise SampleError(which, f"{len(parts) - 1} places for {len(ask.images)} pictures")
        return Turn("human", parts)
    return Turn("human", (*[""] * len(ask.images), f"\n{ask.prompt}"))


def _loader(model: Model, runner: Runner, blind: bool) -> Callable[[Any], np.ndarray]:
    if blind:
        return lambda _: model.blind_picture()

    def load(name: str) -> np.ndarray:
        return model.picture(runner.read_image(name), f"question {runner.question_about(name)!r}, {name}")

    return load


def _stops(model: Model) -> tuple[list[int], str]:
    """Ids that end an answer, and the text that does where the template closes with text."""
    template = resolve_template(model.template, model.tokenizer)
    ids = stop_ids(template, model.tokenizer)
    close = template.answer_close.strip(" ")
    if close in template.specials:
        return ids, ""
    spelled = span_tokenizer(model.tokenizer).middle(close)
    return sorted({*ids, *(spelled if len(spelled) == 1 else ())}), close


def _parts(runner: Runner) -> list[str]:
    return list(dict.fromkeys(ask.part for ask in runner.asks))


def _first() -> bool:
    """Whether this process writes (all processes compute together)."""
    return jax.process_index() == 0


def _meet(point: str) -> None:
    """Waits for all processes, so that none reads what the first is about to change."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)
