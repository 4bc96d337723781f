"""Counts and rates of yes/no benchmarks (yes is the positive class), shared by MME and POPE."""

from collections.abc import Sequence

from mllm_jax.evaluation.benchmarks.answers import ratio

ANSWERS = ("Yes", "No")


def confusion(labels: Sequence[str], answers: Sequence[str]) -> dict[str, int]:
    """TP, FN, TN, FP over pairs whose answer is `yes` or `no`; other answers are in none of them."""
    pairs = list(zip(labels, answers, strict=True))
    return {
        "TP": pairs.count(("yes", "yes")),
        "FN": pairs.count(("yes", "no")),
        "TN": pairs.count(("no", "no")),
        "FP": pairs.count(("no", "yes")),
    }


def rates(labels: Sequence[str], answers: Sequence[str]) -> dict[str, float | int]:
    """Counts, accuracy, precision, recall, F1 and the share of `yes` among all answers.

    Rates over an empty set are 0 (the official scripts stop with a division by zero there).
    """
    c = confusion(labels, answers)
    precision = ratio(c["TP"], c["TP"] + c["FP"])
    recall = ratio(c["TP"], c["TP"] + c["FN"])
    return {
        "n": len(labels),
        **c,
        "accuracy": ratio(c["TP"] + c["TN"], len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": ratio(sum(a == "yes" for a in answers), len(answers)),
    }
