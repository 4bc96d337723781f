"""SEED-Bench-1 (Li et al. 2023): nine image dimensions (the score) and three video ones (kept apart).

An answer is right if it is exactly the letter (the official script and LLaVA's); lmms-eval's reading,
the first character of the stripped text, is printed beside it. The total is over questions, not over
dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, Tally, ratio
from mllm_jax.evaluation.grouping import grouped, load_groups
from mllm_jax.evaluation.predictions import (
    Problems,
    as_text,
    by_id,
    match_ids,
    read_annotations,
    read_rows,
    score_result,
    take,
)

DIMENSIONS = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attributes",
    4: "Instance Location",
    5: "Instances Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
    10: "Action Recognition",
    11: "Action Prediction",
    12: "Procedure Understanding",
}
IMAGE = frozenset(DIMENSIONS[i] for i in range(1, 10))
_TEXT = ("prediction", "text")
_ANSWER = ("answer", "gt_answer")


def _is_video(key: str, item: dict[str, Any]) -> bool:
    if "data_type" in item:
        return item["data_type"] == "video"
    if "question_type_id" in item:
        return int(item["question_type_id"]) > 9
    return key.startswith("v")


def _read_gold(path: Path) -> dict[str, Any]:
    """Rows, or the official `SEED-Bench.json` with its `questions`."""
    value = read_annotations(path)
    rows = value.get("questions", [value]) if isinstance(value, dict) else value
    return by_id(rows, ("question_id",), path)


def _score_files(predictions: Path, annotations: Path | None, groups: Path | None = None) -> dict[str, Any]:
    problems = Problems()
    rows = read_rows(predictions, problems)
    gold = None if annotations is None else _read_gold(annotations)
    found = match_ids(
        rows,
        gold,
        lambda r: str(take(r, ("question_id",), str(predictions))),
        lambda r: take(r, _TEXT, str(predictions)),
        problems,
    )
    parts, dimensions, lmms = Tally(), Tally(), Tally()
    unparsed = 0
    for key, row in found.items():
        item = row if gold is None else gold[key]
        answer = as_text(take(item, _ANSWER, f"{annotations or predictions}: {key}"))
        text = as_text(take(row, _TEXT, ""))
        part = "video" if _is_video(key, item) else "image"
        unparsed += text not in ("A", "B", "C", "D")
        parts.add(part, text == answer)
        lmms.add(part, text.strip()[:1] == answer)
        if "question_type_id" in item:
            dimensions.add(DIMENSIONS[int(item["question_type_id"])], text == answer)
    cells = dimensions.counts()
    image_cells = {name: cell for name, cell in cells.items() if name in IMAGE}
    grouping = grouped("seed_bench", image_cells, load_groups(groups))
    counts = parts.counts()
    image, video = counts.get("image", [0, 0]), counts.get("video", [0, 0])
    return score_result(
        "seed_bench",
        n=image[1],
        unparsed=unparsed,
        score=ratio(*image),
        unit="fraction",
        subtasks={name: ratio(*cell) for name, cell in sorted(cells.items(), key=_place)},
        groups=grouping["micro"],
        problems=problems,
        image={"n": image[1], "correct": image[0], "accuracy": ratio(*image)},
        video={"n": video[1], "correct": video[0], "accuracy": ratio(*video)},
        all={"n": parts.n, "correct": parts.right, "accuracy": ratio(parts.right, parts.n)},
        counts=cells,
        group_scores=grouping,
        lmms_image_accuracy=lmms.accuracy().get("image", 0.0),
    )


def _place(item: tuple[str, list[int]]) -> int:
    return list(DIMENSIONS.values()).index(item[0])


BENCHMARK = Benchmark(
    name="seed_bench",
    unit="fraction",
    score_files=_score_files,
    predictions="JSON lines {question_id, prediction or text}, with gt_answer where there are no annotations",
    annotations="",
    official="SEED-Bench eval.py; LLaVA convert_seed_for_submission.py",
    options=("groups",),
)
