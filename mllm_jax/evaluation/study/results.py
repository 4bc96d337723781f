"""The results of a study, cell by cell, ready to be compared."""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mllm_jax.evaluation.report.runs import ReportError
from mllm_jax.evaluation.study.intervals import Bootstrap
from mllm_jax.evaluation.study.summary import CONDITIONS, unpacked

Samples = Mapping[str, Float[np.ndarray, " R1"]]  # score's name -> the score and its resamples


@dataclasses.dataclass(frozen=True)
class Variant:
    """A cell with its runs, one per seed.

    Attributes:
      name: as the recipe calls it.
      runs: seed -> what the summary holds of the run.
    """

    name: str
    runs: Mapping[int, Mapping[str, Any]]

    @property
    def model(self) -> Mapping[str, Any]:
        """What is said of its model, which is the same for all seeds."""
        return next(iter(self.runs.values()))["model"]

    @property
    def overrides(self) -> Mapping[str, Any]:
        """The keys that the recipe's sweep sets."""
        return next(iter(self.runs.values()))["overrides"]

    @property
    def rate(self) -> float:
        """The factor on the connector's learning rates."""
        scales = (v for k, v in self.overrides.items() if k.endswith(".connector_rate_scale"))
        return float(next(scales, 1.0))

    def trains(self, stage: str) -> bool:
        """Whether its runs have the stage."""
        return any(stage in run["stages"] for run in self.runs.values())

    def step_seconds(self, stage: str) -> float | None:
        """The median over seeds of the median time of a step."""
        times = [run["stages"].get(stage, {}).get("step_seconds") for run in self.runs.values()]
        times = [time for time in times if time is not None]
        return statistics.median(times) if times else None


class Benchmark:
    """What the cells earned on one benchmark.

    Attributes:
      name: of the benchmark.
      abilities: (ability, group, number of questions), in order.
      seeds: of the runs that are compared: those that make most runs comparable.
      crossed: all seeds were asked the same questions.
      variants: the cells that ran with all of these seeds.
      incomplete: the names of those that did not, or were not asked.
    """

    def __init__(self, name: str, questions: Mapping[str, Any], variants: Sequence[Variant]):
        """Takes the cells that were asked the benchmark.

        Raises:
          ReportError: cells were asked different questions with one seed.
        """
        self.name = name
        asked = {
            v.name: {
                seed: run["benchmarks"][name] for seed, run in v.runs.items() if name in run["benchmarks"]
            }
            for v in variants
        }
        self.seeds = _most_shared([frozenset(runs) for runs in asked.values() if runs])
        self.variants = [v for v in variants if asked[v.name].keys() >= set(self.seeds)]
        self.incomplete = [v.name for v in variants if v not in self.variants]
        self._asked = asked
        digests = {}  # seed -> of its questions
        for seed in sorted({seed for runs in asked.values() for seed in runs}):
            found = {runs[seed]["questions"]: variant for variant, runs in asked.items() if seed in runs}
            if len(found) > 1:
                raise ReportError(
                    f"{' and '.join(list(found.values())[:2])} were asked different questions of {name} with seed "
                    f"{seed}, so they cannot be compared; evaluate them again with one configuration"
                )
            (digests[seed],) = found
        self.crossed = len({digests[seed] for seed in self.seeds}) == 1
        layouts = {tuple(map(tuple, questions[digest])) for digest in digests.values()}
        if len(layouts) > 1:
            raise ReportError(f"the seeds of {name} have different abilities or numbers of questions")
        self.abilities: list[tuple[str, str, int]] = list(layouts.pop())

    @property
    def groups(self) -> list[str]:
        """The groups of its abilities, in order."""
        return list(dict.fromkeys(group for _, group, _ in self.abilities if group))

    def outcomes(self, variant: str, condition: str = "model") -> Float[np.ndarray, "S Q"] | None:
        """What each question earned, seed by seed; None if there is nothing under this condition."""
        count = sum(count for _, _, count in self.abilities)
        rows = [self._asked[variant][seed].get(condition) for seed in self.seeds]
        return None if None in rows else np.stack([unpacked(row, count) for row in rows])

    @functools.cached_property
    def samples(self) -> dict[str, Samples]:
        """Variant -> every score with its resamples, alike for all variants."""
        bootstrap = Bootstrap(self.abilities, len(self.seeds), self.crossed)
        return {v.name: bootstrap.scores(self.outcomes(v.name)) for v in self.variants}

    def score(self, variant: str, name: str, condition: str) -> float | None:
        """A score without interval: of an ability or group, under a condition."""
        outcomes = self.outcomes(variant, condition)
        if outcomes is None:
            return None
        values, begin = [], 0
        for ability, group, count in self.abilities:
            if name in (ability, group):
                values.append(outcomes[:, begin : begin + count].mean())
            begin += count
        return float(np.mean(values))


class Study:
    """A summary, read.

    Attributes:
      recipe: FILE.py:ARGUMENT.
      variants: cells in the order of the sweep.
      connectors: names, in the same order.
      benchmarks: name -> what the cells earned on it.
      stages: names, in order.
    """

    def __init__(self, summary: Mapping[str, Any]):
        """Takes the runs.

        Raises:
          ReportError: there are none, one is there twice, or cells were asked different questions.
        """
        self.recipe: str = summary["recipe"]
        if not summary["runs"]:
            raise ReportError(f"the summary of {self.recipe} holds no runs; collect them again")
        runs: dict[str, dict[int, Any]] = {}
        for run in summary["runs"]:
            if run["seed"] in runs.setdefault(run["variant"], {}):
                raise ReportError(
                    f"seed {run['seed']} of {run['variant']} is there twice; collect the runs again"
                )
            runs[run["variant"]][run["seed"]] = run
        self.variants = [Variant(name, dict(sorted(found.items()))) for name, found in runs.items()]
        self.connectors = list(dict.fromkeys(str(v.model["connector"]) for v in self.variants))
        every = list(_runs(self.variants))
        self.stages = list(dict.fromkeys(stage for run in every for stage in run["stages"]))
        names = dict.fromkeys(name for run in every for name in run["benchmarks"])
        self.benchmarks = {name: Benchmark(name, summary["questions"], self.variants) for name in names}


def csv_rows(study: Study) -> list[dict[str, Any]]:
    """`report.csv`: one row per run and ability; docs/sweep.md says what the columns are."""
    rows = []
    for variant in study.variants:
        for seed, run in variant.runs.items():
            for name, found in run["benchmarks"].items():
                benchmark, begin = study.benchmarks[name], 0
                total = sum(count for _, _, count in benchmark.abilities)
                values = {c: unpacked(found[c], total) for c in CONDITIONS if c in found}
                for ability, group, count in benchmark.abilities:
                    part = slice(begin, begin + count)
                    begin += count
                    model = variant.model
                    row = {
                        "study": study.recipe, "variant": variant.name, "connector": model["connector"],
                        "visual_tokens": model["visual_tokens"], "image_size": model["image_size"],
                        "vision": model.get("vision", ""), "llm": model.get("llm", ""),
                        "connector_parameters": model["parameters"].get("connector", 0),
                        "connector_rate_scale": variant.rate, "seed": seed, "benchmark": name, "ability": ability,
                        "group": group, "n": count, "right": round(float(values["model"][part].sum()), 4),
                    }  # fmt: skip
                    for condition, column in (
                        ("model", "accuracy"),
                        ("blind", "blind"),
                        ("majority", "majority"),
                    ):
                        row[column] = (
                            round(float(values[condition][part].mean()), 6) if condition in values else ""
                        )
                    for stage in study.stages:
                        row[f"step_seconds_{stage}"] = run["stages"].get(stage, {}).get("step_seconds", "")
                    rows.append(row)
    return rows


def _most_shared(seeds: Sequence[frozenset[int]]) -> list[int]:
    """Of several cells' seeds those that compare most runs: cells that have them all, times their number."""

    def compared(chosen: frozenset[int]) -> tuple[int, int, list[int]]:
        return len(chosen) * sum(chosen <= one for one in seeds), len(chosen), sorted(chosen, reverse=True)

    return sorted(max(seeds, key=compared))


def _runs(variants: Sequence[Variant]) -> Iterator[Mapping[str, Any]]:
    for variant in variants:
        yield from variant.runs.values()
