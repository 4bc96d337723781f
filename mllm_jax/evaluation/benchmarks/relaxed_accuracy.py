"""Relaxed accuracy (Methani et al. 2020; ChartQA, Masry et al. 2022): 5 % tolerance for numbers.

The rule of pix2struct, Qwen-VL and lmms-eval: both sides parse as numbers ("%" divides by 100) and the
target is not zero: right within 5 %; otherwise equal texts, ignoring case.
"""

import math
from typing import Any

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.predictions import as_text

TOLERANCE = 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_right(text: str, target: str) -> bool:
    """Whether an answer is right within 5 %.

    Example:
        >>> is_right("24.1", "23"), is_right("25", "23"), is_right("12%", "0.12"), is_right("Yes", "yes")
        (True, False, True, True)
    """
    said, wanted = _number(text), _number(target)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= TOLERANCE
    return text.lower() == target.lower()


class RelaxedAccuracy(Benchmark):
    """The rule for any file of answers and targets."""

    name = "relaxed_accuracy"
    rule = "lmms-eval chartqa relaxed_correctness"
    answers_format = "JSON lines {question_id, prediction or text}, with `target` without annotations"
    id_keys = ("question_id", "id", "pid", "row", "index")
    text_keys = ("prediction", "text", "answer")
    not_asked = "it is a rule for files of answers, without questions of its own; ask `chartqa`"

    @classmethod
    def grade(cls, answer: Answer) -> None:
        own = answer.item is answer.row  # there `answer` is the model's
        target = as_text(answer.value("target", "label", *([] if own else ["answer"])))
        wanted = _number(target)
        answer.credit = is_right(answer.text, target)
        # ChartQA reports its human-written and machine-made questions apart.
        answer.part = as_text(answer.item.get("split", answer.item.get("type", "all")))
        answer.notes = {
            "exact": answer.text.strip().lower() == target.strip().lower(),
            "no number": bool(wanted) and math.isfinite(wanted) and _number(answer.text) is None,
        }

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        splits = answers.rates().values()
        return {
            "correct": answers.earned,
            "exact_match": answers.mean("exact"),
            "no_number_where_one_was_wanted": answers.total("no number"),
            "mean_of_splits": ratio(sum(splits), len(splits)),
        }
