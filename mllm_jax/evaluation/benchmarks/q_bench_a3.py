"""Q-Bench A3 (Wu et al. 2024), image quality assessment: do a model's scores follow people's opinions?

A score is the softmax of the logits of "good" and "poor" behind "The quality of the image is", at the official
temperature of 100. Each database has a rank correlation (SRCC) and a linear one (PLCC) with the mean opinion scores;
CGIQA-6K is the mean of its two halves, as in the paper.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from mllm_jax import no_torch
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.predictions import PredictionError, Row

DATABASES = ("spaq", "koniq", "flive", "livec", "cgi", "agi", "kadid")  # in the official order
_TEMPERATURE = 100
_HALF = 3000  # images of each of the two parts of CGIQA-6K


def quality(good: float | int, poor: float | int) -> float:
    """The score of two logits, from 0 to 1.

    Example:
        >>> quality(20.0, 20.0), round(quality(30.0, 10.0), 3)
        (0.5, 0.55)
    """
    return 1 / (1 + math.exp((poor - good) / _TEMPERATURE))


def correlations(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """SRCC and PLCC of (opinion, score) pairs.

    Raises:
      PredictionError: fewer than two pairs, or all opinions or all scores are the same.
    """
    no_torch.unblock()
    from scipy.stats import pearsonr, spearmanr  # slow to import, and only needed here

    opinions, scores = zip(*pairs, strict=True)
    if len(set(opinions)) < 2 or len(set(scores)) < 2:
        raise PredictionError("all scores are the same, so that they have no correlation with opinions")
    return float(spearmanr(opinions, scores)[0]), float(pearsonr(opinions, scores)[0])


class QBenchA3(Benchmark):
    """Stored logits, one file per database."""

    name = "q_bench_a3"
    rule = "Q-Bench leaderboards/IQA_outputs/eval.ipynb"
    answers_format = "folder of <database>.json with objects {img_path, gt_score, logit_good, logit_poor}"
    id_keys = ("img_path",)
    parts: ClassVar = {name: name for name in DATABASES}
    not_asked = "it needs the logits of two words, which are not stored; `mllm-jax score` scores stored ones"
    stores_text = False

    @classmethod
    def stored(cls, row: Row, where: str) -> Any:
        return [row.get("logit_good"), row.get("logit_poor")]

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """Credits nothing: scores are compared with each other."""
        opinion = float(answer.value("gt_score"))
        good, poor = (float(answer.row[key]) for key in ("logit_good", "logit_poor"))
        if not all(map(math.isfinite, (opinion, good, poor))):
            raise PredictionError(f"{answer.where}: a score or logit is no finite number")
        answer.notes["pair"] = (opinion, quality(good, poor))

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        srcc, plcc = {}, {}
        for database, part in answers.parts().items():
            found = [answer.notes["pair"] for answer in part]
            halves = [found[:_HALF], found[_HALF:]] if len(found) == 2 * _HALF else [found]
            parts = [correlations(half) for half in (halves if database == "cgi" else [found])]
            srcc[database], plcc[database] = (sum(values) / len(parts) for values in zip(*parts, strict=True))
        return {
            "score": sum(srcc.values()) / len(srcc),
            "subtasks": srcc,
            "plcc": plcc,
            "mean_plcc": sum(plcc.values()) / len(plcc),
        }
