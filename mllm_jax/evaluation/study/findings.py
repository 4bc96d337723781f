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
TIME_MARGIN = 0.05  # the same of ratios of times, which are measured no more exactly
FASTER = "faster"
HOLDS, FAILS, OPEN, ABSENT = "holds", "does not hold", "undecided", "not run"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about a difference of cells.

    Attributes:
      claim: in words.
      terms: patterns of variants with a sign: the mean of the cells that match, added or subtracted.
      score: of which ability or group; for "faster" the key of a time (`times`).
      expect: "above": the difference is positive; "at least": it is not below -`MARGIN`; "near": it is within
        `MARGIN` on both sides; "faster": the cells of the first term take less time than those of the second, by more
        than `TIME_MARGIN`.
    """

    claim: str
    terms: tuple[tuple[int, str], ...]
    score: str
    expect: str = "above"

    def __post_init__(self) -> None:
        expected = ("above", "at least", "near", FASTER)
        if self.expect not in expected:
            raise ValueError(f"expect={self.expect!r} of {self.claim!r}: choose {', '.join(expected)}")
        if self.expect == FASTER and [sign for sign, _ in self.terms] != [1, -1]:
            raise ValueError(f"{self.claim!r} compares times, so its terms are one with 1 and one with -1")


def difference(claim: str, left: str, right: str, score: str, expect: str = "above") -> Finding:
    """The claim that the cells `left` are above (or near) the cells `right`."""
    return Finding(claim, ((1, left), (-1, right)), score, expect)


def faster(claim: str, left: str, right: str, time: str) -> Finding:
    """The claim that the cells `left` take less of a time (`times`, "step_seconds/finetune", say) than `right`."""
    return Finding(claim, ((1, left), (-1, right)), time, FASTER)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a study says of a finding; NaN where cells are missing.

    Attributes:
      value, low, high: a difference as a share of 1 and its 95 % interval; for "faster" the ratio of the (geometric)
        mean times, and the least and greatest ratio of any two of the cells.
    """

    finding: Finding
    value: float
    low: float
    high: float
    verdict: str


def answer(
    finding: Finding,
    samples: Mapping[str, Mapping[str, Float[np.ndarray, " R1"]]],
    incomplete: Sequence[str] = (),
) -> Answer:
    """Looks a finding about scores up in the results.

    Args:
      samples: variant -> score's name -> the score and its resamples. Where a part of a pattern matches none, the claim
        has not been put to the test.
      incomplete: variants that are not among them, because they lack seeds. A claim about one has not been put to the
        test either.
    """
    total = 0.0
    for sign, patterns in finding.terms:
        if any(matches(name, patterns) for name in incomplete):
            return Answer(finding, np.nan, np.nan, np.nan, ABSENT)
        known = {name: one[finding.score] for name, one in samples.items() if finding.score in one}
        if not all(any(matches(name, pattern) for name in known) for pattern in patterns.split("|")):
            return Answer(finding, np.nan, np.nan, np.nan, ABSENT)
        found = [values for name, values in known.items() if matches(name, patterns)]
        total = total + sign * np.mean(found, axis=0)
    value, low, high = interval(total)
    return Answer(finding, value, low, high, _verdict(finding.expect, low, high))


def answer_time(finding: Finding, seconds: Mapping[str, Mapping[str, float]]) -> Answer:
    """Looks a finding about times up.

    Args:
      seconds: variant -> key of a time -> seconds. Where a part of a pattern matches none, or a cell that it matches
        lacks this time, the claim has not been put to the test.
    """
    (_, left), (_, right) = finding.terms
    sides = []
    for patterns in (left, right):
        found = [one.get(finding.score) for name, one in seconds.items() if matches(name, patterns)]
        if None in found or not all(any(matches(n, p) for n in seconds) for p in patterns.split("|")):
            return Answer(finding, np.nan, np.nan, np.nan, ABSENT)
        sides.append(np.log(np.array(found, float)))
    (one, other) = sides
    ratios = one.mean() - other.mean(), one.min() - other.max(), one.max() - other.min()
    value, low, high = (float(np.exp(ratio)) for ratio in ratios)
    verdict = HOLDS if high < 1 - TIME_MARGIN else FAILS if low > 1 + TIME_MARGIN else OPEN
    return Answer(finding, value, low, high, verdict)


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
