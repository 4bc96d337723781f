"""RefCOCO, RefCOCO+ and RefCOCOg comprehension (Yu et al. 2016; Mao et al. 2016): a box for an expression.

lmms-eval's metrics: mean IoU, ACC@t for five thresholds, Center_ACC, on the original picture. Models
that see a padded square give coordinates on that square; `padded_square` maps them back first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    by_id,
    match_ids,
    read_annotation_rows,
    read_rows,
    score_result,
    take,
)

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOX = re.compile(r"\[\s*" + r",\s*".join([_NUMBER] * 4) + r"\s*\]", re.ASCII)

Box = Sequence[float | int]  # x1, y1, x2, y2 as fractions of width and height


def parse_box(text: str) -> Box | None:
    """The first `[a, b, c, d]` of plain decimals, or None (lmms-eval then takes [0, 0, 0, 0]).

    Example:
        >>> parse_box("It is at [0.1, 0.2, 0.5, 1.0].")
        [0.1, 0.2, 0.5, 1.0]
    """
    found = _BOX.search(text)
    box = [float(value) for value in found.groups()] if found else None
    return box if box is not None and all(map(math.isfinite, box)) else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if both and union else 0.0


def center_inside(outer: Box, box: Box) -> bool:
    """Whether the centre of `box` lies in `outer`, borders included."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3]


def from_square(box: Box, width: float | int, height: float | int) -> Box:
    """A box on the padded square as a box on the original picture.

    Example:
        >>> from_square([0.0, 0.25, 1.0, 0.75], 200, 100)
        [0.0, 0.0, 1.0, 1.0]
    """
    side = max(width, height)
    x, y = (side - width) / 2, (side - height) / 2
    return [
        (box[0] * side - x) / width,
        (box[1] * side - y) / height,
        (box[2] * side - x) / width,
        (box[3] * side - y) / height,
    ]


def _figures(pairs: Sequence[tuple[Box, Box]]) -> dict[str, float]:
    overlaps = [iou(gold, said) for gold, said in pairs]
    figures = {"IoU": ratio(sum(overlaps), len(pairs))}
    for t in THRESHOLDS:
        figures[f"ACC@{t}"] = ratio(sum(o >= t for o in overlaps), len(pairs))
    figures["Center_ACC"] = ratio(sum(center_inside(gold, said) for gold, said in pairs), len(pairs))
    return figures


def _gold_box(item: Any, where: str) -> tuple[Box, float, float]:
    """The annotated [x, y, w, h] in pixels as fractions, with the picture's width and height."""
    x, y, w, h = (float(v) for v in take(item, ("bbox",), where))
    width, height = float(take(item, ("width",), where)), float(take(item, ("height",), where))
    if width <= 0 or height <= 0:
        raise PredictionError(f"{where}: width and height must be positive")
    return [x / width, y / height, (x + w) / width, (y + h) / height], width, height


def _score(name: str, predictions: Path, annotations: Path) -> dict[str, Any]:
    problems = Problems()
    gold = by_id(read_annotation_rows(annotations), ("question_id", "id"), annotations)
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        lambda r: str(take(r, ("question_id", "id"), str(predictions))),
        lambda r: take(r, ("text", "answer", "prediction"), str(predictions)),
        problems,
    )
    pairs, square, unparsed = [], [], 0
    splits: dict[str, list[tuple[Box, Box]]] = {}
    for key, row in found.items():
        box, width, height = _gold_box(gold[key], f"{annotations}: {key}")
        said = parse_box(as_text(take(row, ("text", "answer", "prediction"), "")))
        unparsed += said is None
        pairs.append((box, said or [0.0, 0.0, 0.0, 0.0]))
        square.append((box, from_square(said, width, height) if said else [0.0, 0.0, 0.0, 0.0]))
        splits.setdefault(as_text(gold[key].get("split", "all")), []).append(pairs[-1])
    figures = _figures(pairs)
    return score_result(
        name,
        n=len(pairs),
        unparsed=unparsed,
        score=figures["ACC@0.5"],
        unit="fraction",
        subtasks={split: _figures(part)["ACC@0.5"] for split, part in splits.items()},
        groups={},
        problems=problems,
        **figures,
        padded_square=_figures(square),
    )


def _benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        unit="fraction",
        score_files=lambda predictions, annotations: _score(name, predictions, annotations),
        predictions="JSON lines {question_id, text} with [x1, y1, x2, y2] as fractions in the text",
        annotations="rows {question_id, bbox: [x, y, w, h] in pixels, width, height}, optionally split",
        official="lmms-eval refcoco bbox_rec",
    )


BENCHMARKS = {name: _benchmark(name) for name in ("refcoco", "refcoco+", "refcocog")}
