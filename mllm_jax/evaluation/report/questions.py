"""What a run's stored answers say of its questions: which they were, what each answer earned, what guessing gives."""

import dataclasses
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

from mllm_jax.evaluation.benchmarks import BENCHMARKS, Benchmark
from mllm_jax.evaluation.benchmarks.base import UNUSABLE
from mllm_jax.evaluation.grouping import ability_of
from mllm_jax.evaluation.report.runs import ReportError, Run
from mllm_jax.evaluation.store import AnswerFile, StoreError, key_of
from mllm_jax.storage import Path

# What a stored answer says of its question.
_ASKED = ("prompt", "options", "image", "images", "answer", "gold", "truth")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as it counts: once, with all rotations of its options.

    Attributes:
      ability: its sub-task, "" if it has none.
      asked: equal where prompts, options and right answers of all rotations are equal.
    """

    ability: str
    asked: tuple[str, ...]


def read_questions(run: Run, benchmark: str) -> dict[Hashable, Question]:
    """Id -> question; {} if the answers are not on disk.

    Raises:
      ReportError: the answers are damaged.
    """
    return {
        key: Question(
            ability_of(turns[0]),
            tuple(sorted(json.dumps([row.get(name) for name in _ASKED], sort_keys=True) for row in turns)),
        )
        for key, turns in _turns(run, benchmark, "predictions.jsonl").items()
    }


def read_credits(run: Run, benchmark: str, condition: str = "predictions") -> dict[Hashable, float]:
    """Id -> what the score counts for the answer, 0 to 1: the least over the question's rotations.

    Args:
      condition: whose answers: "predictions", "blind" or "majority".

    Raises:
      ValueError: there is no such credit; says why.
    """
    path, scorer = _file(run, benchmark, f"{condition}.jsonl"), _scorer(run, benchmark)
    kind = run.benchmarks[benchmark]["kind"]
    if not path.is_file():
        raise ValueError(f"{run.name} holds no answers ({path.name})")
    if scorer is None:
        raise ValueError(f"no benchmark {kind!r} is known that grades the answers")
    annotations = path.with_name(scorer.annotations_name) if scorer.annotations_name else None
    if annotations is not None and not annotations.exists():
        raise ValueError(f"{run.name} holds no right answers ({annotations.name})")
    try:
        earned = scorer.credits_in(path, annotations)
    except UNUSABLE as error:
        raise ValueError(f"the answers of {run.name} cannot be graded ({error})") from error
    if not earned:
        raise ValueError(f"{kind} scores its answers together, none earns anything by itself")
    turns = _turns(run, benchmark, path.name)
    found = {
        key: [earned[key_of(row)] for row in rows if key_of(row) in earned] for key, rows in turns.items()
    }
    return {key: min(credits) for key, credits in found.items() if credits}


def guessing(run: Run, benchmark: str) -> float | None:
    """The score of guessing among the options of all rotations; None where the model's likelihoods are not stored.

    Raises:
      ReportError: they are damaged.
    """
    turns = _turns(run, benchmark, "likelihood.jsonl").values()
    odds = [math.prod(1 / _options(row) for row in rows) for rows in turns]
    return statistics.fmean(odds) if odds else None


def _options(row: Mapping[str, Any]) -> int:
    held = row.get("log_likelihoods")
    return max(1, len(held)) if isinstance(held, list) else 1


def _turns(run: Run, benchmark: str, name: str) -> dict[Hashable, list[Mapping[str, Any]]]:
    """Id -> the answers to its rotations."""
    path, scorer = _file(run, benchmark, name), _scorer(run, benchmark)
    found = defaultdict(list)
    try:
        for row in AnswerFile(path, writable=False).rows.values():
            found[key_of(row)[0] if scorer is None else scorer.counted_as(row)].append(row)
    except StoreError as error:
        raise ReportError(str(error)) from error
    except UNUSABLE as error:
        raise ReportError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return found


def _file(run: Run, benchmark: str, name: str) -> Path:
    return run.directory / "eval" / benchmark / name


def _scorer(run: Run, benchmark: str) -> type[Benchmark] | None:
    return BENCHMARKS.get(run.benchmarks[benchmark]["kind"])
