"""Bootstrap over seeds and questions: 95 % intervals of scores and of their differences.

A resample draws as many seeds as there are, with replacement, and of each ability as many questions as it has, with
replacement. Where all seeds were asked the same questions, a resample takes the same ones for every seed (seeds and
questions are crossed); where each seed has questions of its own, they are drawn for each seed apart (nested). All cells
of a study are resampled alike, so the difference of two cells is paired by seed and question: what a hard question or a
lucky seed does to both is no difference.

An ability's score is the mean over seeds and questions, a group's the mean of its abilities, the whole's the mean of
all questions. The interval is the 2.5th to 97.5th percentile of `RESAMPLES` resamples, which are always the same. With
three seeds the draw of seeds is coarse, and the interval rather narrow than wide in what it says of other seeds.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

RESAMPLES, SEED = 4000, 0
ALL = "all"


class Bootstrap:
    """The resamples of a set of questions and seeds.

    Attributes:
      abilities: name -> (group, number of questions), in the order of the outcomes.
    """

    def __init__(self, abilities: Sequence[tuple[str, str, int]], seeds: int, crossed: bool = True):
        self.abilities = {name: (group, count) for name, group, count in abilities}
        rng = np.random.default_rng(SEED)
        self._seeds = rng.integers(0, seeds, (RESAMPLES, seeds))  # which seeds are drawn
        self._questions = {
            name: np.stack(
                [
                    rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float32) / count
                    for _ in range(1 if crossed else seeds)
                ]
            )  # weights [1 or S, R, Q]: of all that are drawn, or of each of them
            for name, (_, count) in self.abilities.items()
        }

    def scores(self, outcomes: Float[np.ndarray, "S Q"]) -> dict[str, Float[np.ndarray, " R1"]]:
        """Of every ability, group and of all: the score and then its resamples.

        Args:
          outcomes: what each question earned, 0 to 1, seed by seed.
        """
        found, begin, sizes = {}, 0, {}
        for name, (_, count) in self.abilities.items():
            part = outcomes[:, begin : begin + count].astype(np.float32)
            begin += count
            of_seeds = [weights @ part.T for weights in self._questions[name]]  # [R, S] each
            drawn = (
                np.take_along_axis(of_seeds[slot % len(of_seeds)], self._seeds[:, slot : slot + 1], 1)[:, 0]
                for slot in range(len(part))
            )
            samples = sum(drawn) / len(part)
            found[name], sizes[name] = np.concatenate([[part.mean(dtype=np.float64)], samples]), count
        groups: dict[str, list[str]] = {}
        for name in found:
            groups.setdefault(self.abilities[name][0], []).append(name)
        parts = {
            group: np.mean([found[name] for name in names], axis=0)
            for group, names in groups.items()
            if group
        }
        whole = sum(size * found[name] for name, size in sizes.items()) / sum(sizes.values())
        return {**found, **parts, ALL: whole}


def interval(samples: Float[np.ndarray, " R1"]) -> tuple[float, float, float]:
    """The score and the ends of its 95 % interval.

    Args:
      samples: the score and its resamples, or a difference of two such arrays.
    """
    low, high = np.percentile(samples[1:], (2.5, 97.5))
    return float(samples[0]), float(low), float(high)
