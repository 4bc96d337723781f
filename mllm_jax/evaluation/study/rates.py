"""Each connector's learning rate, from the runs of a grid on a validation split (`mllm_jax.sweep.rates`)."""

from typing import Any

from mllm_jax.evaluation.report.runs import ReportError
from mllm_jax.evaluation.report.sections import Section, Table
from mllm_jax.evaluation.study.intervals import ALL
from mllm_jax.evaluation.study.results import Study


def choose(study: Study) -> dict[str, dict[str, Any]]:
    """Cell -> its factor with the highest score, and what the others had.

    The score is the mean over benchmarks of the share of questions answered right. Of equal ones the factor nearest to
    1 is taken, which changes the recipe least.

    Raises:
      ReportError: a cell ran with one factor only, or its factors cannot be compared: not all have the same seeds and
        benchmarks.
    """
    chosen = {}
    for name, benchmark in study.benchmarks.items():
        if benchmark.incomplete:
            seeds = ", ".join(map(str, benchmark.seeds))
            raise ReportError(
                f"{benchmark.incomplete[0]} has no answers to {name} with all of the seeds {seeds}, as others have, so "
                "the factors cannot be compared; run the same seeds of all"
            )
    for cell, scores in _scores(study).items():
        if len(scores) < 2:
            raise ReportError(
                f"{cell!r} ran with the factor {next(iter(scores))} only; run the recipe's rates sweep"
            )
        chosen[cell] = {
            "factor": _best(scores),
            "scores": {f"{factor:g}": round(score, 4) for factor, score in scores.items()},
        }
    return chosen


def untried(choice: dict[str, Any]) -> str:
    """The side ("smaller", "larger") on which nothing ran beyond the factor of `choose`; "" where both have runs."""
    tried = [float(factor) for factor in choice["scores"]]
    return {min(tried): "smaller", max(tried): "larger"}.get(choice["factor"], "")


def rates_section(study: Study) -> Section:
    """What each cell scored on the validation split at each factor."""
    found = _scores(study)
    factors = sorted({factor for scores in found.values() for factor in scores})
    rows = [
        (
            cell,
            *(f"{100 * scores[factor]:.1f}" if factor in scores else "–" for factor in factors),
            f"{_best(scores):g}" if len(scores) > 1 else "–",
        )
        for cell, scores in found.items()
    ]
    about = (
        "Questions of a validation split that were answered right, in %, by the factor on the connector's learning "
        "rates. “mllm-jax study rates” chooses the best one; the rates of everything else are the same for all cells."
    )
    head = ("cell", *(f"× {factor:g}" for factor in factors), "best")
    return Section(f"{study.recipe}: learning rates", (about, Table(head, tuple(rows))))


def _scores(study: Study) -> dict[str, dict[float, float]]:
    """Cell -> factor -> score, the smallest factor first."""
    found: dict[str, dict[float, float]] = {}
    for variant in sorted(study.variants, key=lambda variant: variant.rate):
        scores = [
            float(b.samples[variant.name][ALL][0])
            for b in study.benchmarks.values()
            if variant.name in b.samples
        ]
        if scores:
            found.setdefault(_cell(variant.name), {})[variant.rate] = sum(scores) / len(scores)
    order = dict.fromkeys(_cell(variant.name) for variant in study.variants)
    return {cell: found[cell] for cell in order if cell in found}


def _cell(name: str) -> str:
    """What `mllm_jax.sweep.rates.grid` calls its cells after: "linear" of "linear-rate0.3"."""
    return name.rpartition("-rate")[0] or name


def _best(scores: dict[float, float]) -> float:
    return min(scores, key=lambda factor: (-round(scores[factor], 6), max(factor, 1 / factor)))
