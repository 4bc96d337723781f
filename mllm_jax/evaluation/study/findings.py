"""What a study asks: contrasts of cells, each with what the paper found, and whether that holds here.

Most are differences of scores; `faster` is about what is measured in seconds. A recipe declares them in
`get_findings(argument)`, as `Finding`s; they are kept with the results.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mllm_jax.evaluation.study.intervals import interval

MARGIN = 0.03  # differences smaller than this count as none
FASTER = "faster"
HOLDS, FAILS, OPEN, ABSENT = "holds", "does not hold", "undecided", "not run"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about a difference of cells.

    Attributes:
      claim: in words.
      terms: patterns of variants with a sign: the mean of the cells that match, added or subtracted.
      score: of which ability or group; for "faster" which time: a stage, whose steps count, or what `latency` measures.
      expect: "above": the difference is positive; "at least": it is not below -`MARGIN`; "near": it is within
        `MARGIN` on both sides; "faster": the cells that are added take less time than those that are subtracted.
    """

    claim: str
    terms: tuple[tuple[int, str], ...]
    score: str
    expect: str = "above"

    def __post_init__(self) -> None:
        if self.expect not in ("above", "at least", "near", FASTER):
            raise ValueError(
                f"expect={self.expect!r} of {self.claim!r}: choose above, at least, near or {FASTER}"
            )


def difference(claim: str, left: str, right: str, score: str, expect: str = "above") -> Finding:
    """The claim that the cells `left` are above (or near) the cells `right`."""
    return Finding(claim, ((1, left), (-1, right)), score, expect)


def faster(claim: str, left: str, right: str, time: str) -> Finding:
    """The claim that the cells `left` take less `time` than the cells `right`."""
    return Finding(claim, ((1, left), (-1, right)), time, FASTER)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a study says of a finding; NaN where cells are missing.

    Attributes:
      difference, low, high: a difference as a share of 1 and its 95 % interval; for "faster" a ratio of times, and the
        smallest and largest of the cells.
    """

    finding: Finding
    difference: float
    low: float
    high: float
    verdict: str


def answer(
    finding: Finding,
    samples: Mapping[str, Mapping[str, Float[np.ndarray, " R1"]]],
    times: Mapping[str, Mapping[str, float]],
) -> Answer:
    """Looks a finding up in the results. Where a part of a pattern matches no cell, it has not been put to the test.

    Args:
      samples: variant -> score's name -> the score and its resamples.
      times: variant -> name of a time -> seconds.
    """
    known = times if finding.expect == FASTER else samples
    values = {name: one[finding.score] for name, one in known.items() if finding.score in one}
    terms = []  # sign, values of the cells
    for sign, patterns in finding.terms:
        if not all(any(matches(name, pattern) for name in values) for pattern in patterns.split("|")):
            return Answer(finding, np.nan, np.nan, np.nan, ABSENT)
        terms.append((sign, [one for name, one in values.items() if matches(name, patterns)]))
    if finding.expect == FASTER:
        (_, left), (_, right) = terms
        ratios = np.divide(left, np.mean(right))
        value, low, high = float(ratios.mean()), float(ratios.min()), float(ratios.max())
        verdict = HOLDS if high < 1 else FAILS if low > 1 else OPEN
        return Answer(finding, value, low, high, verdict)
    value, low, high = interval(sum(sign * np.mean(found, axis=0) for sign, found in terms))
    return Answer(finding, value, low, high, _verdict(finding.expect, low, high))


def matches(name: str, patterns: str) -> bool:
    """Whether a variant's name matches one of several patterns, which `|` parts."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split("|"))


def _verdict(expect: str, low: float, high: float) -> str:
    if expect == "above":
        return HOLDS if low > 0 else FAILS if high < 0 else OPEN
    if expect == "at least":
        return HOLDS if low > -MARGIN else FAILS if high < -MARGIN else OPEN
    return HOLDS if low > -MARGIN and high < MARGIN else FAILS if low > MARGIN or high < -MARGIN else OPEN


def as_dicts(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as JSON."""
    return [{**dataclasses.asdict(one), "terms": [list(term) for term in one.terms]} for one in findings]


def from_dicts(values: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What `as_dicts` was given.

    Raises:
      ValueError: it is something else.
    """
    try:
        return [
            Finding(
                one["claim"],
                tuple((int(sign), str(p)) for sign, p in one["terms"]),
                one["score"],
                one["expect"],
            )
            for one in values
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"damaged findings ({type(error).__name__}: {error})") from None
