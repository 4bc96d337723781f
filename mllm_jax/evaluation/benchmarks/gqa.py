"""GQA (Hudson and Manning 2019): exact match on the balanced questions of test-dev.

A prediction is the text without trailing full stops, in lower case (LLaVA's `convert_gqa_for_eval.py`);
the official `eval.py` then compares it with the answer. lmms-eval's match, which also ignores
punctuation, is printed beside. Consistency, validity and plausibility are not computed: they need
answers to all questions and the scene graphs' choices.
"""

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import File, Upload
from mllm_jax.evaluation.benchmarks.short_answer import ShortAnswer
from mllm_jax.evaluation.predictions import PredictionError, Row, as_text
from mllm_jax.storage import Path

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FILE = "testdev_balanced_questions.json"
_SITE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"


def normalize(text: str) -> str:
    """The form that is uploaded.

    Example:
        >>> normalize("On the left..")
        'on the left'
    """
    return text.rstrip(".").lower()


def _lmms(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


class Gqa(ShortAnswer):
    """GQA test-dev, balanced questions."""

    name = "gqa"
    unit = "percent"
    rule = "GQA eval.py (accuracy); LLaVA convert_gqa_for_eval.py"
    answers_format = "JSON array {questionId, prediction}, or LLaVA JSON lines {question_id, text}"
    annotations_format = _FILE
    id_keys = ("questionId", "question_id", "id")
    text_keys = ("prediction", "text", "answer")
    keyed = True
    upload = Upload("testdev_balanced_predictions.json", "GQA's eval.py")
    files: ClassVar = {
        "questions": File((_FILE, f"questions1.2/{_FILE}"), _SITE),
        "images": File(("images",), _SITE),
    }

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            if row.get("isBalanced", True):
                truth = {"answer": row.get("answer"), "types": row.get("types") or {}}
                kind = truth["types"].get("structural", "")
                image, gold = f"{row['imageId']}.jpg", truth["answer"]
                yield self.question(row["_id"], self.prompt(row), [image], gold, ability=kind, truth=truth)

    @classmethod
    def read_annotations(cls, path: Path) -> Mapping[Any, Row]:
        gold = super().read_annotations(path)
        balanced = {key: row for key, row in gold.items() if row.get("isBalanced", True)}
        if not balanced:
            raise PredictionError(f"{path}: no balanced question; use testdev_balanced_questions.json")
        return balanced

    @classmethod
    def grade(cls, answer: Answer) -> None:
        gold = as_text(answer.value("answer"))
        answer.credit = normalize(answer.text) == gold
        answer.notes["lmms"] = _lmms(answer.text) == _lmms(gold)
        types = answer.item.get("types") or {}
        answer.notes |= {kind: types.get(kind) or None for kind in ("structural", "semantic")}
        answer.notes["kind"] = "binary" if types and types.get("structural") != "query" else "open"

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        structural = answers.rates("structural", 100)
        return {
            "subtasks": structural | answers.rates("semantic", 100),
            "correct": answers.earned,
            "answer_kinds": answers.rates("kind", 100) if structural else {},
            "lmms_exact_match": answers.mean("lmms", 100),
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        return [{"questionId": row["question_id"], "prediction": normalize(row["text"])} for row in rows]
