"""POPE (Li et al. 2023): does the model claim objects that are not in the image?

Default: LLaVA's rule, `no` if the first sentence has the word "No", "not" or "no", else `yes`; the
headline is the mean F1 over the splits. lmms-eval's rule (exact `yes` / `no`, one pooled set) is
printed beside it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import SHORT, SHORT_TOKENS, File, Published
from mllm_jax.evaluation.benchmarks.yes_no import ANSWERS, rates
from mllm_jax.evaluation.predictions import PredictionError, Row, as_text, by_id, read_annotation_rows, take
from mllm_jax.storage import Path

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
    all_rates = rates(labels, answers)
    return {name: all_rates[name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")} | {
        "yes_ratio_upstream": ratio(list(labels).count("yes"), len(labels)),
        "other": sum(answer not in ("yes", "no") for answer in answers),
    }


class Pope(Published):
    """POPE on COCO: three splits; ids are those of LLaVA's question file."""

    name = "pope"
    rule = "LLaVA eval_pope.py; lmms-eval pope beside it"
    answers_format = "LLaVA JSON lines {question_id, text}"
    annotations_format = f"folder with coco_pope_<split>.json and {QUESTIONS}, or JSON lines with `label`"
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
                label = str(row["label"]).lower()
                yield self.question(
                    number,
                    f"{row['text']}\n{SHORT}",
                    [row["image"]],
                    label.capitalize(),
                    ANSWERS,
                    ability=split,
                    fields={"category": split},
                    truth={"label": label, "category": split},
                )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        return parse_llava(text), "neither counts as yes" if says_neither(text) else "yes or no"

    @classmethod
    def grade(cls, answer: Answer) -> None:
        answer.notes["said"], _ = cls.parse(answer.text, answer.item)
        answer.parsed = not says_neither(answer.text)
        answer.credit = answer.notes["said"] == answer.item["label"]
        answer.part = answer.item["split"]

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        parts = answers.parts()
        details = {
            split: rates(_labels(parts[split]), [answer.notes["said"] for answer in parts[split]])
            for split in sorted(sorted(parts), key=lambda s: (*SPLITS, s).index(s))
        }
        f1 = {split: figures["f1"] for split, figures in details.items()}
        # In this order: the sum's last digit depends on it.
        ordered = dict.fromkeys(s for s in ("random", "popular", "adversarial", *f1) if s in f1)
        mean_f1 = ratio(sum(f1[split] for split in ordered), len(f1))
        lmms = score_lmms(_labels(answers), [answer.text for answer in answers])
        return {"score": mean_f1, "subtasks": f1, "mean_f1": mean_f1, "details": details, "lmms": lmms}

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Row]:
        """question_id -> {split, label}, from one file with labels or from the files of the splits.

        Raises:
            PredictionError: label files and question file do not belong together.
        """
        if path.is_file():
            rows = read_annotation_rows(path)
            if any("label" in row for row in rows):
                return {
                    key: {"split": row.get("category", "all"), "label": take(row, ("label",), str(path))}
                    for key, row in by_id(rows, ("question_id",), path).items()
                }
        file = path if path.is_file() else _find(path, QUESTIONS)
        by_split: dict[str, list[Row]] = {}
        for row in by_id(read_annotation_rows(file), ("question_id",), file).values():
            by_split.setdefault(take(row, ("category",), str(file)), []).append(row)
        gold = {}
        for split, questions in by_split.items():
            for number, label in _labels_of(questions, _find(path, f"coco_pope_{split}.json"), file.name):
                gold[number] = {"split": split, "label": label}
        return gold


def _labels(answers: Answers) -> list[str]:
    return [answer.item["label"] for answer in answers]


def _find(annotations: Path, name: str) -> Path:
    for place in (annotations, annotations.parent):
        for path in (place / name, place / "coco" / name):
            if path.is_file():
                return path
    raise PredictionError(f"{annotations}: {name} is neither there nor one folder up, nor in coco/")


def _labels_of(questions: Sequence[Row], path: Path, asked_in: str) -> Iterator[tuple[str, Any]]:
    """(question_id, label) of a split's questions.

    Ids are unique across splits only in LLaVA's file: rows correspond by their order inside a split.
    """
    labels = read_annotation_rows(path)
    if len(labels) != len(questions):
        raise PredictionError(
            f"{path}: {len(labels)} labels for {len(questions)} questions of {asked_in}; the random split has 2910 "
            "rows in the version that LLaVA's question file belongs to"
        )
    for question, label in zip(questions, labels, strict=True):
        asked = as_text(question.get("text")).split("\n", 1)[0]
        if question.get("image") != label.get("image") or asked != label.get("text"):
            raise PredictionError(
                f"{path}: question_id {label.get('question_id')} ({label.get('text')!r}) is not question "
                f"{question['question_id']} of {asked_in} ({asked!r})"
            )
        yield str(question["question_id"]), label["label"]
