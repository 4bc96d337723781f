"""Differences between runs, each computed on the questions that both runs were asked."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from mllm_jax.evaluation.report.questions import read_credits, read_questions
from mllm_jax.evaluation.report.runs import Run

RESAMPLES, SEED = 10_000, 0
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a run differs from the baseline on a group of common questions; shares of 1.

    Attributes:
      group: name of the group; `ALL` for all questions.
      n: questions that both were asked in the same words.
      baseline: the baseline's mean credit on them.
      score: the run's.
      difference: `score` - `baseline`.
      low, high: ends of the 95 % bootstrap interval of the difference.
    """

    group: str
    n: int
    baseline: float
    score: float
    difference: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A run beside the baseline.

    Attributes:
      run: its name.
      differences: of all common questions and of each group.
      absent: why there are none; "" if there are.
    """

    run: str
    differences: tuple[Difference, ...] = ()
    absent: str = ""


def compare(runs: Sequence[Run], baseline: Run, benchmark: str) -> list[Comparison]:
    """The other runs that were asked the benchmark beside the baseline, which was too.

    Raises:
      ReportError: stored answers are damaged.
    """
    return [_compare(run, baseline, benchmark) for run in runs if run is not baseline]


def _compare(run: Run, baseline: Run, benchmark: str) -> Comparison:
    ours, theirs = (read_questions(one, benchmark) for one in (run, baseline))
    try:
        earned, before = (read_credits(one, benchmark) for one in (run, baseline))
    except ValueError as error:
        return Comparison(run.name, absent=str(error))
    common = [
        key
        for key, question in theirs.items()
        if key in ours and question.asked == ours[key].asked and key in earned and key in before
    ]
    if not common:
        return Comparison(run.name, absent=f"{run.name} and {baseline.name} have no question in common")
    groups: Mapping[str, str] = baseline.benchmarks[benchmark]["groups"]
    parts = [(ALL, common)] + [
        (group, [key for key in common if groups.get(theirs[key].ability) == group])
        for group in dict.fromkeys(groups.values())
        if group
    ]
    found = []
    for group, keys in parts:
        if keys:
            a, b = (np.array([credits[key] for key in keys]) for credits in (before, earned))
            low, high = bootstrap_interval(b - a)
            means = float(a.mean()), float(b.mean()), float((b - a).mean())
            found.append(Difference(group, len(keys), *means, low, high))
    return Comparison(run.name, tuple(found))


def bootstrap_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over `RESAMPLES` bootstrap samples of the values, always the same ones.

    A sample of n values drawn with replacement is how often each different value is drawn: a multinomial draw.

    Example:
      >>> bootstrap_interval(np.array([0.0, 1.0] * 5))
      (0.2, 0.8)
    """
    different, counts = np.unique(values.round(9), return_counts=True)
    drawn = np.random.default_rng(SEED).multinomial(len(values), counts / len(values), RESAMPLES)
    low, high = np.percentile(drawn @ different / len(values), (2.5, 97.5))
    return float(low), float(high)
