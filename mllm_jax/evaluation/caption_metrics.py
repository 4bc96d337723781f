"""BLEU, ROUGE-L and CIDEr on tokenized captions, digit for digit those of the COCO caption tools.

BLEU (Papineni et al. 2002) over the corpus with the closest reference length; ROUGE-L (Lin 2004) with
beta = 1.2; CIDEr-D (Vedantam et al. 2015) with n = 4, sigma = 6 and document frequencies of the scored
images. Sums run in the order of the images, as in pycocoevalcap, because the last digits depend on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

MAX_N = 4
_TINY, _SMALL = 1e-15, 1e-9  # keep quotients defined without n-grams, as in the original
_BETA = 1.2
_SIGMA = 6.0

Ngrams = Counter[tuple[str, ...]]


def ngrams(caption: str) -> Ngrams:
    """Counts of the 1- to 4-grams of a tokenized caption, in order of length, then place."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 with clipped counts and the brevity penalty.

    Example:
        >>> [round(b, 3) for b in bleu(["a cat on a mat"], [["a cat on a mat"]])]
        [1.0, 1.0, 1.0, 1.0]
    """
    correct, guessed = [0] * MAX_N, [0] * MAX_N
    said_length = wanted_length = 0
    for prediction, refs in zip(predictions, references, strict=True):
        length = len(prediction.split())
        said_length += length
        wanted_length += min((abs(n - length), n) for n in (len(ref.split()) for ref in refs))[1]
        most: Ngrams = Counter()
        for ref in refs:
            most |= ngrams(ref)
        for n in range(MAX_N):
            guessed[n] += max(0, length - n)
        for gram, count in ngrams(prediction).items():
            correct[len(gram) - 1] += min(most[gram], count)
    scores, product = [], 1.0
    for n in range(MAX_N):
        product *= (correct[n] + _TINY) / (guessed[n] + _SMALL)
        scores.append(product ** (1.0 / (n + 1)))
    ratio = (said_length + _TINY) / (wanted_length + _SMALL)
    if ratio < 1:
        scores = [score * math.exp(1 - 1 / ratio) for score in scores]
    return scores


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption: F with the best precision and the best recall over the references."""
    said = prediction.split(" ")
    precision = recall = 0.0
    for reference in references:
        wanted = reference.split(" ")
        common = LCSseq.similarity(wanted, said)
        precision = max(precision, common / len(said))
        recall = max(recall, common / len(wanted))
    if precision == 0 or recall == 0:
        return 0.0
    return ((1 + _BETA**2) * precision * recall) / (recall + _BETA**2 * precision)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D per image; document frequencies come from these images' references.

    The length in the Gaussian penalty is the number of bigrams, as in the original code (the paper says
    words).
    """
    cooked = [[ngrams(ref) for ref in refs] for refs in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for refs in cooked:
        frequency.update({gram for ref in refs for gram in ref})
    log_images = np.log(float(len(references)))

    def vector(counts: Ngrams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_N)]
        squares = [0.0] * MAX_N
        bigrams = 0
        for gram, count in counts.items():
            n = len(gram) - 1
            weight = float(count) * (log_images - np.log(max(1.0, frequency[gram])))
            weights[n][gram] = weight
            squares[n] += pow(weight, 2)
            bigrams += count if n == 1 else 0
        return weights, [np.sqrt(square) for square in squares], bigrams

    scores = []
    for prediction, refs in zip(predictions, cooked, strict=True):
        said, said_norm, said_length = vector(ngrams(prediction))
        total = np.zeros(MAX_N)
        for ref in refs:
            wanted, wanted_norm, wanted_length = vector(ref)
            penalty = np.e ** (-(float(said_length - wanted_length) ** 2) / (2 * _SIGMA**2))
            similarity = np.zeros(MAX_N)
            for n in range(MAX_N):
                for gram, weight in said[n].items():
                    other = wanted[n].get(gram, 0.0)
                    similarity[n] += min(weight, other) * other
                if said_norm[n] != 0 and wanted_norm[n] != 0:
                    similarity[n] /= said_norm[n] * wanted_norm[n]
                similarity[n] *= penalty
            total += similarity
        scores.append(float(np.mean(total) / len(refs) * 10.0))
    return scores


def mean(values: Sequence[float]) -> float:
    """NumPy's mean, whose pairwise summation decides the last digit of the official numbers."""
    return float(np.mean(np.array(values))) if len(values) else 0.0
