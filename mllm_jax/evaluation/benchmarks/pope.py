"""POPE (Li et al. 2023): does the model claim objects that are not in the picture?

Default: LLaVA's rule, `no` if the first sentence has the word "No", "not" or "no", else `yes`; the
headline is the mean F1 over the splits. lmms-eval's rule (exact `yes` / `no`, one pooled set) is
printed beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark, ratio
from mllm_jax.evaluation.benchmarks.yes_no import rates
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

SPLITS = ("adversarial", "popular", "random")
QUESTIONS = "llava_pope_test.jsonl"


def parse_llava(text: str) -> str:
    """`no` if the text before the first full stop has the word "No", "not" or "no"; else `yes`.

    Example:
        >>> [parse_llava(t) for t in ("No, it is not", "There is not a dog", "none", "Yes. No", "NO")]
        ['no', 'no', 'yes', 'yes', 'yes']
    """
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def says_neither(text: str) -> bool:
    """Whether the first sentence has neither a yes nor a no, so that `parse_llava` falls back to `yes`."""
    words = text.split(".", 1)[0].replace(",", "").lower().split()
    return parse_llava(text) == "yes" and "yes" not in words


def score_lmms(labels: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """lmms-eval's rule: only an exact `yes` or `no` counts; other answers are wrong and in no other rate.

    Its `yes_ratio` is computed from the labels (an upstream bug); the answers' ratio stands beside it.
    """
    answers = [text.lower().strip() for text in texts]
    r = rates(labels, answers)
    return {
        "accuracy": r["accuracy"],
        "precision": r["precision"],
        "recall": r["recall"],
        "f1": r["f1"],
        "yes_ratio_upstream": ratio(sum(label == "yes" for label in labels), len(labels)),
        "yes_ratio": r["yes_ratio"],
        "other": sum(answer not in ("yes", "no") for answer in answers),
    }


def _find(annotations: Path, name: str) -> Path | None:
    places = [annotations, annotations.parent]
    for place in (*places, *(p / "coco" for p in places)):
        if (place / name).is_file():
            return place / name
    return None


def _labelled(annotations: Path) -> dict[str, Mapping[str, Any]]:
    """question_id -> {split, label}.

    Raises:
        PredictionError: label files and question file do not belong together.
    """
    if annotations.is_file():
        rows = read_annotation_rows(annotations)
        rows = rows if isinstance(rows, list) else [rows]
        if any("label" in row for row in rows):  # one file with its own labels
            return {
                key: {"split": row.get("category", "all"), "label": take(row, ("label",), str(annotations))}
                for key, row in by_id(rows, ("question_id",), annotations).items()
            }
    path = annotations if annotations.is_file() else _find(annotations, QUESTIONS)
    if path is None:
        raise PredictionError(f"{annotations}: {QUESTIONS} is neither there nor one folder up")
    gold: dict[str, Mapping[str, Any]] = {}
    by_split: dict[str, list[Mapping[str, Any]]] = {}
    for row in by_id(read_annotation_rows(path), ("question_id",), path).values():
        by_split.setdefault(take(row, ("category",), str(path)), []).append(row)
    for split, questions in by_split.items():
        labels_path = _find(annotations, f"coco_pope_{split}.json")
        if labels_path is None:
            raise PredictionError(f"{annotations}: coco_pope_{split}.json is not there, nor in coco/")
        labels = read_annotation_rows(labels_path)
        if len(labels) != len(questions):
            raise PredictionError(
                f"{labels_path}: {len(labels)} labels for {len(questions)} questions of {path.name}; the "
                "random split has 2910 rows in the version that LLaVA's question file belongs to"
            )
        # Ids are unique across splits only in LLaVA's file: rows correspond by their order inside a split.
        for question, label in zip(questions, labels, strict=True):
            asked = as_text(question.get("text")).split("\n", 1)[0]
            if question.get("image") != label.get("image") or asked != label.get("text"):
                raise PredictionError(
                    f"{labels_path}: question_id {label.get('question_id')} ({label.get('text')!r}) is not "
                    f"question {question['question_id']} of {path.name} ({asked!r})"
                )
            gold[str(question["question_id"])] = {"split": split, "label": label["label"]}
    return gold


def _score_files(predictions: Path, annotations: Path | None) -> dict[str, Any]:
    problems = Problems()
    gold = _labelled(annotations)
    found = match_ids(
        read_rows(predictions, problems),
        gold,
        lambda r: str(take(r, ("question_id",), str(predictions))),
        lambda r: take(r, ("text", "answer"), str(predictions)),
        problems,
    )
    return score_pope(
        {
            key: (gold[key]["split"], gold[key]["label"], as_text(take(row, ("text", "answer"), "")))
            for key, row in found.items()
        },
        problems,
    )


def score_pope(answers: Mapping[str, tuple[str, str, str]], problems: Problems) -> dict[str, Any]:
    """Scores question id -> (split, label, text)."""
    rows = list(answers.values())
    splits = sorted({split for split, _, _ in rows}, key=lambda s: (*SPLITS, s).index(s))
    details = {}
    for split in splits:
        part = [(label, text) for s, label, text in rows if s == split]
        details[split] = rates([label for label, _ in part], [parse_llava(text) for _, text in part])
    f1 = {split: r["f1"] for split, r in details.items()}
    # In this order: the sum's last digit depends on it.
    order = [s for s in ("random", "popular", "adversarial") if s in f1]
    order += [s for s in f1 if s not in order]
    mean_f1 = ratio(sum(f1[s] for s in order), len(order))
    lmms = score_lmms([label for _, label, _ in rows], [text for _, _, text in rows])
    return score_result(
        "pope",
        n=len(rows),
        unparsed=sum(says_neither(text) for _, _, text in rows),
        score=mean_f1,
        unit="fraction",
        subtasks=f1,
        groups={},
        problems=problems,
        mean_f1=mean_f1,
        details=details,
        lmms=lmms,
    )


BENCHMARK = Benchmark(
    name="pope",
    unit="fraction",
    score_files=_score_files,
    predictions="LLaVA JSON lines {question_id, text}",
    annotations=f"folder with coco_pope_<split>.json and {QUESTIONS}, or one JSON lines file with `label`",
    official="LLaVA eval_pope.py; lmms-eval pope beside it",
)
