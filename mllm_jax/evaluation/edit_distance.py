"""Levenshtein distance (rapidfuzz) and the two ANLS variants that published numbers use."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein


def most_similar(text: str, choices: Sequence[str]) -> int:
    """Index of the choice with the smallest distance, the first one on ties.

    Raises:
        ValueError: there are no choices.
    """
    if not choices:
        raise ValueError("no choices to compare with")
    distances = [Levenshtein.distance(text, choice) for choice in choices]
    return distances.index(min(distances))


def anls_m4c(text: str, answers: Sequence[str]) -> float | None:
    """ST-VQA's ANLS as in M4C: best 1 - distance / longer length over the answers, 0 below one half.

    Returns:
        A fraction; None where the original divides by zero (text and an answer are both empty).
    """
    text = text.lower().strip()
    values = []
    for answer in answers:
        answer = answer.lower().strip()
        length = max(len(text), len(answer))
        if length == 0:
            return None
        similarity = 1 - Levenshtein.distance(text, answer) / length
        values.append(similarity if similarity >= 0.5 else 0.0)
    return max(values)


def anls_lmms(text: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """lmms-eval's ANLS: white space is collapsed for the distance but not for the length it is divided by."""
    said = " ".join(text.strip().lower().split())
    values = []
    for answer in answers:
        length = max(len(answer.upper()), len(text.upper()))
        distance = Levenshtein.distance(" ".join(answer.strip().lower().split()), said)
        values.append(distance / length if length else 0.0)
    similarity = 1 - min(values)
    return similarity if similarity >= threshold else 0.0
