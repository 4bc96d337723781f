"""Each connector's learning rate, from the runs of a grid on a validation split (`mllm_jax.sweep.rates`)."""

from typing import Any

from mllm_jax.evaluation.report.runs import ReportError
from mllm_jax.evaluation.report.sections import Section, Table
from mllm_jax.evaluation.study.intervals import ALL
from mllm_jax.evaluation.study.results import Study


def choose(study: Study) -> dict[str, dict[str, Any]]:
    """Connector -> its factor with the highest score over all questions of all benchmarks, and what the others had.

    Of equal ones the factor nearest to 1 is taken, which changes the recipe least.

    Raises:
      ReportError: a connector ran with one factor only.
    """
    found: dict[str, dict[float, float]] = {}
    for variant in study.variants:
        scores = [
            float(b.samples[variant.name][ALL][0])
            for b in study.benchmarks.values()
            if variant.name in b.samples
        ]
        if scores:
            found.setdefault(str(variant.model["connector"]), {})[variant.rate] = sum(scores) / len(scores)
    chosen = {}
    for connector, scores in found.items():
        if len(scores) < 2:
            raise ReportError(
                f"connector {connector!r} ran with the factor {next(iter(scores))} only; run the recipe's rates sweep"
            )
        factor = min(scores, key=lambda factor: (-round(scores[factor], 6), max(factor, 1 / factor)))
        chosen[connector] = {
            "factor": factor,
            "scores": {f"{f:g}": round(score, 4) for f, score in sorted(scores.items())},
        }
    return chosen


def rates_section(study: Study) -> Section:
    """What each connector scored on the validation split at each factor."""
    chosen = choose(study)
    factors = sorted({factor for one in chosen.values() for factor in one["scores"]}, key=float)
    rows = [
        (
            connector,
            *(f"{100 * one['scores'][factor]:.1f}" if factor in one["scores"] else "–" for factor in factors),
            f"{one['factor']:g}",
        )
        for connector, one in chosen.items()
    ]
    about = (
        "Questions of a validation split that were answered right, in %, by the factor on the connector's learning "
        "rates. The best one is used in the study; the rates of everything else are the same for all cells."
    )
    head = ("connector", *(f"× {factor}" for factor in factors), "chosen")
    return Section(f"{study.recipe}: learning rates", (about, Table(head, tuple(rows))))
