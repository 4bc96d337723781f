"""Judged video benchmarks: MSVD-QA, MSRVTT-QA, ActivityNet-QA and the five Video-ChatGPT scores.

Scores stored judgements (`mllm-jax judge` makes them), as in the Video-ChatGPT evaluation (Maaz et al.
2024): accuracy is the share of "yes" among "yes" and "no" (other verdicts are in neither, and counted
as unparsed); scores are integers 0-5, averaged. A judgement that cannot be read leaves its question
unanswered: the official scripts ask again until all are there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    by_id,
    match_ids,
    read_annotation_rows,
    read_json,
    score_result,
    take,
)

MAX_SCORE = 5
ASPECTS = {
    "CI": "correctness",
    "DO": "detail",
    "CU": "context",
    "TU": "temporal",
    "CO": "consistency",
}
_DICT = re.compile(r"\{[^{}]*\}")


def parse_judgement(text: str) -> dict[str, Any] | None:
    """The Python dict in a judge's reply, or None.

    Example:
        >>> parse_judgement("{'pred': 'yes', 'score': 4}")
        {'pred': 'yes', 'score': 4}
    """
    for candidate in (text.strip(), *_DICT.findall(text)):
        try:
            value = ast.literal_eval(candidate)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(value, dict):
            return value
    return None


def read_score(judgement: Mapping[str, Any] | None) -> int | None:
    """The integer score 0-5 of a judgement, or None."""
    value = None if judgement is None else judgement.get("score")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        score = int(value)
    except (ValueError, OverflowError):
        return None
    return score if 0 <= score <= MAX_SCORE else None


def read_verdict(judgement: Mapping[str, Any] | None) -> str | None:
    """`yes` or `no` by substring, yes first (as upstream), or None."""
    said = as_text(None if judgement is None else judgement.get("pred")).lower()
    return "yes" if "yes" in said else "no" if "no" in said else None


def read_judgements(path: Path, problems: Problems) -> list[dict[str, Any]]:
    """Rows {id, judgement, model} from a combined official file (id -> [judgement, question]) or JSON lines.

    JSON lines hold `id` and either `judgement` (a dict) or `content` (the judge's reply).
    """
    value = read_json(path, problems)
    if as_map(value, ("id", "question_id")) is not None:
        first = {key: v[0] if isinstance(v, list) and v else v for key, v in value.items()}
        rows = [{"id": key, "judgement": judgement} for key, judgement in first.items()]
    else:
        listed = value if isinstance(value, list) else [value]
        rows = [dict(row) for row in listed if isinstance(row, dict)]
    out = []
    for row in rows:
        judgement = row.get("judgement")
        if not isinstance(judgement, dict):
            judgement = parse_judgement(as_text(row.get("content", judgement)))
        key = str(take(row, ("id", "question_id"), str(path)))
        out.append({"id": key, "judgement": judgement, "model": row.get("model")})
    return out


def _readable(path: Path, ids: list[str] | None, problems: Problems) -> dict[Any, Any]:
    rows = read_judgements(path, problems)
    found = match_ids(rows, ids, lambda r: r["id"], lambda r: r["judgement"], problems)
    for key, row in list(found.items()):
        if read_score(row["judgement"]) is None:
            problems.add("missing", f"{path.name}: {key}: no readable judgement")
            del found[key]
    if not found:
        raise PredictionError(f"{path}: no readable judgement in it")
    return found


def _ids(annotations: Path | None) -> list[str] | None:
    if annotations is None:
        return None
    return list(by_id(read_annotation_rows(annotations), ("question_id", "id"), annotations))


def _score_qa(name: str, predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    found = _readable(predictions, _ids(annotations), problems)
    verdicts = [read_verdict(row["judgement"]) for row in found.values()]
    scores = [read_score(row["judgement"]) for row in found.values()]
    yes, no = verdicts.count("yes"), verdicts.count("no")
    return score_result(
        name,
        n=len(found),
        unparsed=verdicts.count(None),
        score=ratio(yes, yes + no),
        unit="fraction",
        subtasks={},
        groups={},
        problems=problems,
        yes=yes,
        no=no,
        average_score=ratio(sum(scores), len(found)),
        judge_models=sorted({row["model"] for row in found.values() if row["model"]}),
    )


def _score_generative(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    if not predictions.is_dir():
        names = ", ".join(f"{name}.json" for name in ASPECTS.values())
        raise PredictionError(f"{predictions}: give the folder with the judgements {names} (or .jsonl)")
    problems = Problems()
    means: dict[str, float] = {}
    n, models = 0, set()
    for short, aspect in ASPECTS.items():
        places = [predictions / f"{aspect}{suffix}" for suffix in (".json", ".jsonl")]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            problems.add("missing", f"{aspect}.json")
            continue
        found = _readable(path, None, problems)
        means[short] = ratio(sum(read_score(row["judgement"]) for row in found.values()), len(found))
        n += len(found)
        models |= {row["model"] for row in found.values() if row["model"]}
    return score_result(
        "video_chatgpt",
        n=n,
        unparsed=0,
        score=ratio(sum(means.values()), len(means)),
        unit="points",
        subtasks=means,
        groups={},
        problems=problems,
        judge_models=sorted(models),
    )


def _qa_benchmark(name: str) -> Benchmark:
    return Benchmark(
        name=name,
        unit="fraction",
        score_files=lambda predictions, annotations: _score_qa(name, predictions, annotations),
        predictions="judgements: JSON id -> [{pred, score}, item], or JSON lines {id, judgement or content}",
        annotations="",
        official="Video-ChatGPT evaluate_activitynet_qa.py",
    )


BENCHMARKS = {name: _qa_benchmark(name) for name in ("msvd_qa", "msrvtt_qa", "activitynet_qa")}
BENCHMARKS["video_chatgpt"] = Benchmark(
    name="video_chatgpt",
    unit="points",
    score_files=_score_generative,
    predictions="folder with correctness, detail, context, temporal and consistency (.json or .jsonl)",
    annotations="",
    official="Video-ChatGPT evaluate_benchmark_*.py",
)
