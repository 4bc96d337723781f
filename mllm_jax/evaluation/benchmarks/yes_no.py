"""Counts and rates of yes/no benchmarks (yes is the positive class), shared by MME and POPE."""

from collections.abc import Sequence

from mllm_jax.evaluation.benchmarks.answers import ratio

ANSWERS = ("Yes", "No")


def confusion(labels: Sequence[str], answers: Sequence[str]) -> dict[str, float | int]:
    """TP, FN, TN, FP, precision and recall of pairs whose answer is `yes` or `no`; others are in none of them.

    Rates over an empty set are 0 (the official scripts stop with a division by zero there).
    """
    pairs = list(zip(labels, answers, strict=True))
    said = {"TP": ("yes", "yes"), "FN": ("yes", "no"), "TN": ("no", "no"), "FP": ("no", "yes")}
    c = {name: pairs.count(pair) for name, pair in said.items()}
    return c | {
        "precision": ratio(c["TP"], c["TP"] + c["FP"]),
        "recall": ratio(c["TP"], c["TP"] + c["FN"]),
    }


def rates(labels: Sequence[str], answers: Sequence[str]) -> dict[str, float | int]:
    """Counts, accuracy, precision, recall, F1 and the share of `yes` among all answers."""
    c = confusion(labels, answers)
    both = c["precision"] + c["recall"]
    return {
        "n": len(labels),
        **c,
        "accuracy": ratio(c["TP"] + c["TN"], len(labels)),
        "f1": 2 * c["precision"] * c["recall"] / both if both else 0.0,
        "yes_ratio": ratio(list(answers).count("yes"), len(answers)),
    }
