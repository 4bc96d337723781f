"""POPE (Li et al. 2023): does the model claim objects that are not in the image?

Default: LLaVA's rule, `no` if the first sentence has the word "No", "not" or "no", else `yes`; the
headline is the mean F1 over the splits. lmms-eval's rule (exact `yes` / `no`, one pooled set) is
printed beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import SHORT, SHORT_TOKENS, File, Published, value_of
from mllm_jax.evaluation.benchmarks.yes_no import ANSWERS, rates
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    by_id,
    read_annotation_rows,
    take,
)

SPLITS = ("adversarial", "popular", "random")
QUESTIONS = "llava_pope_test.jsonl"
# In the order and with the first ids (less one) of LLaVA's question file.
_FIRST_IDS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
# This version has the 2910 random questions that published LLaVA numbers are about; newer ones have 3000.
_SOURCE = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


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


class Pope(Published):
    """POPE on COCO: three splits; ids are those of LLaVA's question file."""

    name = "pope"
    rule = "LLaVA eval_pope.py; lmms-eval pope beside it"
    answers_format = "LLaVA JSON lines {question_id, text}"
    annotations_format = (
        f"folder with coco_pope_<split>.json and {QUESTIONS}, or one JSON lines file with `label`"
    )
    id_keys = ("question_id",)
    max_new_tokens = SHORT_TOKENS
    files: ClassVar = {
        split: File((f"coco/coco_pope_{split}.json", f"coco_pope_{split}.json"), _SOURCE)
        for split in _FIRST_IDS
    } | {"images": File(("val2014",), "https://cocodataset.org/#download")}

    def items(self) -> Iterator[Question]:
        for split, start in _FIRST_IDS.items():
            (path,) = self.paths(split)
            for number, row in enumerate(self.read_table(path), start + 1):
                label = str(value_of(row, "label", path)).lower()
                yield self.question(
                    number,
                    f"{value_of(row, 'text', path)}\n{SHORT}",
                    (value_of(row, "image", path),),
                    label.capitalize(),
                    ANSWERS,
                    ability=split,
                    fields={"category": split},
                    truth={"label": label, "category": split},
                )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return parse_llava(text), "neither counts as yes" if says_neither(text) else "yes or no"

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Mapping[str, Any]]:
        return _labelled(path)

    @classmethod
    def grade(cls, answer: Answer) -> None:
        answer.notes["said"] = parse_llava(answer.text)
        answer.parsed = not says_neither(answer.text)
        answer.credit = answer.notes["said"] == answer.item["label"]

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        parts: dict[str, list[Answer]] = {}
        for answer in answers:
            parts.setdefault(answer.item["split"], []).append(answer)
        splits = sorted(sorted(parts), key=lambda s: (*SPLITS, s).index(s))
        details = {
            split: rates([a.item["label"] for a in parts[split]], [a.notes["said"] for a in parts[split]])
            for split in splits
        }
        f1 = {split: r["f1"] for split, r in details.items()}
        # In this order: the sum's last digit depends on it.
        order = [s for s in ("random", "popular", "adversarial") if s in f1]
        order += [s for s in f1 if s not in order]
        mean_f1 = ratio(sum(f1[s] for s in order), len(order))
        return {
            "score": mean_f1,
            "subtasks": f1,
            "mean_f1": mean_f1,
            "details": details,
            "lmms": score_lmms([a.item["label"] for a in answers], [a.text for a in answers]),
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
