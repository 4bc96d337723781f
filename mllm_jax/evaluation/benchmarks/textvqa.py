"""TextVQA validation (Singh et al. 2019): soft accuracy against ten answers; two ANLS variants beside it.

Follows LLaVA's `eval_textvqa.py` with M4C's evaluator: an answer that no human gave scores 0.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import File, Option
from mllm_jax.evaluation.benchmarks.question_files import FileRow
from mllm_jax.evaluation.benchmarks.short_answer import ShortAnswer
from mllm_jax.evaluation.edit_distance import anls_lmms, anls_m4c
from mllm_jax.evaluation.predictions import BenchmarkError, Row, as_text, take
from mllm_jax.evaluation.vqa_normalize import m4c_normalize, soft_accuracy
from mllm_jax.storage import Path

_SITE = "https://dl.fbaipublicfiles.com/textvqa"
_OCR = "Reference OCR token:"


def question_of(prompt: str) -> str:
    """The question in one of LLaVA's TextVQA prompts, in lower case.

    Example:
        >>> question_of("What is it?\\nReference OCR token: A, B\\nAnswer the question using a single word.")
        'what is it?'
    """
    lines = prompt.split("\n")
    if len(lines) == 3 and lines[0].startswith(_OCR):
        return lines[1].lower()
    return lines[0].lower()


def score_question(text: str, answers: Sequence[str]) -> float:
    """Soft accuracy of one answer, both sides normalised."""
    human = [m4c_normalize(as_text(a)) for a in answers]
    return soft_accuracy(m4c_normalize(text), human)


class TextVqa(ShortAnswer):
    """TextVQA validation as LLaVA asks it: with the OCR tokens of its question file, or without them."""

    name = "textvqa"
    unit = "percent"
    rule = "LLaVA eval_textvqa.py (M4C evaluator)"
    answers_format = "LLaVA JSON lines {question_id, prompt, text}"
    annotations_format = "TextVQA_0.5.1_val.json"
    id_keys = ("question_id",)
    rows_key = "data"
    options: ClassVar = {"ocr": Option(True, "whether the prompt lists OCR tokens, as in LLaVA's file")}
    files: ClassVar = {
        "questions": File(
            ("llava_textvqa_val_v051_ocr.jsonl",),
            "eval.zip of LLaVA's docs/Evaluation.md (or give ocr=false)",
        ),
        "annotations": File(("TextVQA_0.5.1_val.json",), f"{_SITE}/data/TextVQA_0.5.1_val.json"),
        "images": File(("train_images",), f"{_SITE}/images/train_val_images.zip"),
    }

    def items(self) -> Iterator[Question]:
        annotations = self.rows("annotations", "data")
        if not self.values["ocr"]:
            for row in annotations:
                prompt = f"{row['question'].capitalize()}{self.suffix}"
                yield self._item(row, prompt, f"{row['image_id']}.jpg")
            return
        truths: dict[tuple[str, str], deque[FileRow]] = defaultdict(deque)
        for row in annotations:
            truths[row["image_id"], row["question"].lower()].append(row)
        for row in self.rows():
            # LLaVA writes the image's id as question_id, so that questions are found by their words.
            text, image = (str(row[key]) for key in ("text", "image"))
            found = truths[str(row["question_id"]), text.split("\n")[0].lower()]
            if not found:
                asked = text.split("\n")[0]
                raise BenchmarkError(
                    f"{row.where}: {asked!r} about {row['question_id']} is not in the annotations"
                )
            yield self._item(found.popleft(), text, image)

    def _item(self, row: FileRow, prompt: str, image: str) -> Question:
        gold = list(row["answers"]) if row.get("answers") else None
        truth = {key: row[key] for key in ("image_id", "question")} | {"answers": row.get("answers")}
        fields = {"image_id": row["image_id"]}
        return self.question(row["question_id"], prompt, (image,), gold, fields=fields, truth=truth)

    @classmethod
    def identifier(cls, gold: Any, path: Path) -> Callable[[Row], str]:
        """By id, else by (image, question) as LLaVA's files need."""
        gold = gold or {}
        by_question = {(item["image_id"], item["question"].lower()): key for key, item in gold.items()}

        def identify(row: Row) -> str:
            key = str(take(row, ("question_id",), str(path)))
            if key in gold:
                return key
            image = row.get("image_id", row["question_id"])  # LLaVA writes the image's id as question_id
            asked = question_of(as_text(row.get("prompt")))
            return by_question.get((image, asked), f"{image} / {asked!r}")

        return identify

    @classmethod
    def grade(cls, answer: Answer) -> None:
        text, answers = answer.text, [as_text(a) for a in answer.value("answers")]
        answer.credit = score_question(text, answers)
        answer.notes = {
            "exact": m4c_normalize(text) in {m4c_normalize(a) for a in answers},
            "m4c": anls_m4c(text, answers),
            "lmms": anls_lmms(text, answers),
        }

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        m4c = [answer.notes["m4c"] for answer in answers if answer.notes["m4c"] is not None]
        return {
            "anls": {
                "m4c_STVQAANLS": ratio(sum(m4c), len(m4c)),
                "m4c_undefined_rows": len(answers) - len(m4c),
                "m4c_STVQAAccuracy": answers.mean("exact"),
                "lmms_eval_anls": answers.mean("lmms"),
            }
        }
