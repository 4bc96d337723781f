"""What a study asks: contrasts of cells, each with what the paper found, and whether that holds here.

A recipe declares them in `get_findings(argument)`, as `Finding`s; they are kept with the results.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mllm_jax.evaluation.study.intervals import interval

MARGIN = 0.03  # differences smaller than this count as none
HOLDS, FAILS, OPEN, ABSENT = "holds", "does not hold", "undecided", "not run"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about a difference of cells.

    Attributes:
      claim: in words.
      terms: patterns of variants with a sign: the mean of the cells that match, added or subtracted.
      score: of which ability or group.
      expect: "above": the difference is positive; "at least": it is not below -`MARGIN`; "near": it is within
        `MARGIN` on both sides.
    """

    claim: str
    terms: tuple[tuple[int, str], ...]
    score: str
    expect: str = "above"

    def __post_init__(self) -> None:
        if self.expect not in ("above", "at least", "near"):
            raise ValueError(f"expect={self.expect!r} of {self.claim!r}: choose above, at least or near")


def difference(claim: str, left: str, right: str, score: str, expect: str = "above") -> Finding:
    """The claim that the cells `left` are above (or near) the cells `right`."""
    return Finding(claim, ((1, left), (-1, right)), score, expect)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a study says of a finding; differences as shares of 1, NaN where cells are missing."""

    finding: Finding
    difference: float
    low: float
    high: float
    verdict: str


def answer(finding: Finding, samples: Mapping[str, Mapping[str, Float[np.ndarray, " R1"]]]) -> Answer:
    """Looks a finding up in the results.

    Args:
      samples: variant -> score's name -> the score and its resamples. Where a part of a pattern matches none, the claim
        has not been put to the test.
    """
    total = 0.0
    for sign, patterns in finding.terms:
        known = {name: one[finding.score] for name, one in samples.items() if finding.score in one}
        if not all(any(matches(name, pattern) for name in known) for pattern in patterns.split("|")):
            return Answer(finding, np.nan, np.nan, np.nan, ABSENT)
        found = [values for name, values in known.items() if matches(name, patterns)]
        total = total + sign * np.mean(found, axis=0)
    value, low, high = interval(total)
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
