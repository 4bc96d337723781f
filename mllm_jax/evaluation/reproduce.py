"""Scores every answer file of a data folder and compares each figure with the official scorer's.

A data folder has one folder per benchmark with answer files, annotations and an `expected.json` that
holds what the official scorer gives on exactly these files. Every comparison is exact: a difference in
the last digit is a difference.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.reproduce_rows import CHECKS

Result = dict[str, Any]


@dataclasses.dataclass
class Comparison:
    """One answer file: its headline figure, and how many figures were compared in all.

    Attributes:
        benchmark: the benchmark's name.
        answers: the answer file or folder, relative to the data folder.
        headline: name of the figure shown.
        expected: its official value.
        obtained: ours.
        figures: all compared figures, name -> (expected, obtained).
        seconds: wall time of scoring.
    """

    benchmark: str
    answers: str
    headline: str
    expected: float | int = math.nan
    obtained: float | int = math.nan
    figures: dict[str, tuple[float | int, float | int]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def difference(self) -> float | int:
        return self.obtained - self.expected

    @property
    def differing(self) -> list[str]:
        """Names of the figures that are not equal in every digit."""
        return [name for name, (expected, obtained) in self.figures.items() if expected != obtained]


def _flatten(prefix: str, expected: Any, obtained: Any) -> Iterator[tuple[str, float | int, float | int]]:
    """Every number (or text) below `expected`, with its counterpart; a missing one is NaN."""
    if isinstance(expected, Mapping):
        for key, value in expected.items():
            other = obtained.get(key, math.nan) if isinstance(obtained, Mapping) else math.nan
            yield from _flatten(f"{prefix}.{key}" if prefix else str(key), value, other)
    elif isinstance(expected, list):
        if not isinstance(obtained, list) or len(obtained) != len(expected):
            yield prefix, float(len(expected)), math.nan
            return
        for i, (value, other) in enumerate(zip(expected, obtained, strict=True)):
            yield from _flatten(f"{prefix}[{i}]", value, other)
    elif isinstance(expected, bool) or not isinstance(expected, (int, float)):
        yield prefix, 1.0, float(expected == obtained)
    else:
        yield prefix, expected, obtained if isinstance(obtained, (int, float)) else math.nan


def _only(entry: Mapping[str, Any], *skip: str) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k not in ("published", "note", "scorer", *skip)}


# One case: answers, annotations, headline, and a function (result, expected entry) -> what to compare
# with it.
@dataclasses.dataclass(frozen=True)
class _Case:
    benchmark: str
    answers: str
    annotations: str | None
    headline: str
    expected: Mapping[str, Any]
    obtain: Callable[[Result], Mapping[str, Any]]


def _mme(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected, "eval_type").items():
        answers = name if (folder / name).is_dir() else f"{name}.jsonl"
        yield _Case(
            "mme", answers, "ground_truth", "perception", _only(entry),
            lambda r: {**r, "subtasks": r["details"]},
        )  # fmt: skip


def _pope(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected).items():
        if (folder / f"{name}_labels.jsonl").is_file():
            yield _Case(
                "pope", f"{name}_answers.jsonl", f"{name}_labels.jsonl", "f1", _only(entry),
                lambda r: r["details"]["all"],
            )  # fmt: skip
        else:
            yield _Case(
                "pope", f"{name}.jsonl", ".", "mean_f1", _only(entry), lambda r: {**r, **r["details"]}
            )


def _scienceqa(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected).items():
        yield _Case(
            "scienceqa", f"{name}.jsonl", "test_answers.json", "accuracy", _only(entry),
            lambda r: {**r, "total": r["n"]},
        )  # fmt: skip


def _mmmu(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    def obtain(r: Result) -> Mapping[str, Any]:
        counts = r["domain_counts"]
        domains = {name: {"num": counts[name][1], "acc": acc} for name, acc in r["domains"].items()}
        return r | {
            "overall": r["score"],
            "subjects": r["subtasks"],
            "domains": domains,
            "n_random_fallback": r["random_fallbacks"],
        }

    files = {"eval_only": "total_val_output.json", "parse_and_eval": "responses.jsonl"}
    for name, entry in _only(expected).items():
        for kind, suffix in files.items():
            yield _Case(
                "mmmu", f"{name}_{suffix}", "answer_dict_val.json", "overall", _only(entry[kind]), obtain
            )


def _mmmu_pro(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    def obtain(r: Result) -> Mapping[str, Any]:
        return {
            "total": r["n"],
            "correct_fallback_counted_wrong": r["correct"],
            "accuracy_fallback_counted_wrong": r["score"],
            "n_random_fallback": r["unparsed"],
            "subjects_correct_total": r["counts"],
        }

    for name, entry in _only(expected).items():
        # What the authors stored has unseeded random draws in it: nobody can reproduce that figure.
        wanted = _only(entry, "accuracy_as_stored_by_authors")
        headline = "accuracy_fallback_counted_wrong"
        yield _Case("mmmu_pro", f"{name}.jsonl", None, headline, wanted, obtain)


def _mathvista(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected).items():
        yield _Case(
            "mathvista", f"{name}.jsonl", None, "average.accuracy", _only(entry),
            lambda r: {
                **r["breakdown"],
                "average": {"accuracy": r["score"], "correct": r["correct"], "total": r["n"]},
            },
        )  # fmt: skip


def _blink(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected).items():
        yield _Case(
            "blink", f"predictions/{name}.json", "val_answers.json", "total", _only(entry),
            lambda r: {**r, "total": r["score"], "tasks": r["subtasks"]},
        )  # fmt: skip


def _mmbench(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    def whole(r: Result) -> Mapping[str, Any]:
        return {
            "rows": r["rows"],
            "circular_groups": r["n"],
            "circular_correct": r["correct"],
            "circular_accuracy": r["score"],
            "per_row_correct": r["row_correct"],
            "per_row_accuracy": r["row_accuracy"],
            "vanilla_first_pass_correct": r["vanilla_correct"],
            "vanilla_first_pass_accuracy": r["vanilla_accuracy"],
        }

    def part(r: Result) -> Mapping[str, Any]:
        return {
            "n": r["n"],
            "circular_correct": r["correct"],
            "category": r["counts"],
            "l2-category": r["l2_counts"],
        }

    for name, entry in _only(expected).items():
        subsets = {key: value for key, value in entry.items() if (*folder.glob(f"*_{key}.tsv"),)}
        rest = _only(entry, "group_size_histogram", *subsets)
        yield _Case("mmbench", f"{name}.jsonl", None, "circular_accuracy", rest, whole)
        for key, value in subsets.items():
            tsv = next(folder.glob(f"*_{key}.tsv")).name
            yield _Case("mmbench", f"{name}.jsonl", tsv, "circular_correct", value, part)


def _seed_bench(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    def by_dimension(r: Result) -> Mapping[str, Any]:
        cells = enumerate(r["subtasks"].items(), 1)
        return {
            "overall": r["image"],
            "dimensions": {
                f"{i} {name}": {
                    "correct": r["counts"][name][0],
                    "n": r["counts"][name][1],
                    "accuracy": accuracy,
                }
                for i, (name, accuracy) in cells
            },
        }

    for name, entry in _only(expected).items():
        if name.endswith("_by_dimension"):
            model, subset = name.removesuffix("_by_dimension").rsplit("_", 1)
            questions = f"questions_{subset}.jsonl"
            yield _Case("seed_bench", f"{model}.jsonl", questions, "overall.accuracy", entry, by_dimension)
        else:
            yield _Case("seed_bench", f"{name}.jsonl", None, "image.accuracy", _only(entry), dict)


def _textvqa(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    annotations = next(folder.glob("val*.json")).name
    for name, entry in _only(expected).items():
        yield _Case(
            "textvqa", f"{name}.jsonl", annotations, "accuracy", _only(entry),
            lambda r: {**r, "accuracy": r["score"]},
        )  # fmt: skip


def _vqav2(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    annotations = next(folder.glob("*_annotations.json")).name
    split = annotations.removesuffix("_annotations.json")
    for name, entry in _only(expected, "prediction_files").items():
        if isinstance(entry, Mapping) and "overall" in entry:
            yield _Case(
                "vqav2", f"{split}_{name}.json", annotations, "overall", _only(entry),
                lambda r: {
                    "n": r["n"],
                    "overall": r["score"],
                    "perAnswerType": r["subtasks"],
                    "perQuestionType": r["per_question_type"],
                },
            )  # fmt: skip


def _captions(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected).items():
        yield _Case(
            "captions", f"{name}_predictions.json", f"{name}_references.json", "CIDEr", _only(entry),
            lambda r: {**r, "n_images": r["n"]},
        )  # fmt: skip


def _relaxed_accuracy(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected).items():
        yield _Case(
            "relaxed_accuracy", f"{name}.jsonl", None, "relaxed_accuracy", _only(entry),
            lambda r: {"n": r["n"], "relaxed_correct": r["correct"], "relaxed_accuracy": r["score"]},
        )  # fmt: skip


def _nextqa(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    def cells(accuracy: Mapping[str, float], counts: Mapping[str, list[int]]) -> dict[str, Any]:
        return {k: {"correct": counts[k][0], "n": counts[k][1], "accuracy": v} for k, v in accuracy.items()}

    def obtain(r: Result) -> Mapping[str, Any]:
        return {
            "types": cells(r["subtasks"], r["counts"]),
            "groups": cells(r["question_groups"], r["question_group_counts"]),
            "overall": {"correct": r["correct"], "n": r["n"], "accuracy": r["score"]},
        }

    for name, entry in _only(expected).items():
        annotations = f"{name.rsplit('_', 1)[-1]}.csv"
        wanted = _only(entry, "official_printout")
        yield _Case("nextqa", f"{name}.json", annotations, "overall.accuracy", wanted, obtain)


def _llava_bench(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    runs = [key for key in expected if key.startswith("eval")]

    def one(r: Result) -> Mapping[str, Any]:
        return next(iter(r["runs"].values()))

    for key in runs:
        answers = next(folder.glob(f"*-{key}.jsonl")).name
        yield _Case("llava_bench", answers, None, "all.relative", expected[key], one)
    mean = {"mean_of_three": expected["mean_of_three"]}
    yield _Case("llava_bench", ".", None, "mean_of_three", mean, lambda r: {"mean_of_three": r["score"]})


def _mm_vet(folder: Path, expected: Mapping[str, Any]) -> Iterator[_Case]:
    for name, entry in _only(expected).items():
        model, runs = name.rsplit("_", 1)
        yield _Case("mm_vet", f"{model}_grades_{runs}.json", "capabilities.json", "mean.total", entry, dict)


_FOLDERS: dict[str, Callable[[Path, Mapping[str, Any]], Iterator[_Case]]] = {
    "mme": _mme,
    "pope": _pope,
    "scienceqa": _scienceqa,
    "mmmu": _mmmu,
    "mmmu_pro": _mmmu_pro,
    "mathvista": _mathvista,
    "blink": _blink,
    "mmbench": _mmbench,
    "seed_bench": _seed_bench,
    "textvqa": _textvqa,
    "vqav2": _vqav2,
    "captions": _captions,
    "relaxed_accuracy": _relaxed_accuracy,
    "nextqa": _nextqa,
    "llava_bench": _llava_bench,
    "mm_vet": _mm_vet,
}


def _score(folder: Path, case: _Case) -> Comparison:
    started = time.perf_counter()
    annotations = None if case.annotations is None else folder / case.annotations
    result = get_benchmark(case.benchmark).score(folder / case.answers, annotations)
    if not result["complete"]:  # a file that is a subset of the questions on purpose
        result = result | result["partial"]
    done = Comparison(case.benchmark, f"{folder.name}/{case.answers}".removesuffix("/."), case.headline)
    obtained = case.obtain(result)
    for name, expected, value in _flatten("", case.expected, obtained):
        done.figures[name] = (expected, value)
    done.expected, done.obtained = done.figures[case.headline]
    done.seconds = time.perf_counter() - started
    return done


def check_rows(data: Path) -> list[Comparison]:
    """Compares readings of single answers, where a folder has the official ones: how many of the rows agree."""
    done = []
    for name, check in CHECKS.items():
        if not (Path(data) / name / "expected.json").is_file():
            continue
        for answers, what, pairs in check(Path(data) / name):
            equal = sum(official == ours for official, ours in pairs)
            row = Comparison(name, f"{name}/{answers}", what, len(pairs), equal)
            row.figures[what] = (len(pairs), equal)
            done.append(row)
    return done


def score_folder(data: Path) -> list[Comparison]:
    """Scores everything below a data folder.

    Args:
        data: holds folders such as `mme/` and `pope/`, each with an `expected.json`.

    Raises:
        ValueError: a folder has an `expected.json` but no rule here, or there is none at all.
    """
    data = Path(data)
    found = sorted(path.parent for path in data.glob("*/expected.json"))
    if not found:
        raise ValueError(f"{data}: no folder in it has an expected.json")
    cases = []
    for folder in found:
        if folder.name not in _FOLDERS:
            raise ValueError(f"{folder}: no rule for this folder; there are {sorted(_FOLDERS)}")
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        cases += [(folder, case) for case in _FOLDERS[folder.name](folder, expected)]
    with ThreadPoolExecutor(2) as pool:  # METEOR waits for Java: the others run meanwhile
        slow = {i: pool.submit(_score, *c) for i, c in enumerate(cases) if c[1].benchmark == "captions"}
        done = [None if i in slow else _score(*case) for i, case in enumerate(cases)]
        return [slow[i].result() if one is None else one for i, one in enumerate(done)]
