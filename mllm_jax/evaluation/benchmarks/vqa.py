"""Short answers with one reference each: exact match after normalisation, with the majority baseline.

The benchmark for a user's own data (`easy_vqa`, `nlvr`, ...).
"""

from collections import Counter
from typing import Any

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Benchmark, Question
from mllm_jax.evaluation.benchmarks.mini import same_answer
from mllm_jax.evaluation.benchmarks.question_files import read_list
from mllm_jax.evaluation.predictions import BenchmarkError, Row, as_text
from mllm_jax.evaluation.vqa_normalize import m4c_normalize
from mllm_jax.mini.world.questions import OPEN_SUFFIX
from mllm_jax.storage import Path


class Vqa(Benchmark):
    """Rows {question_id, image or video, question, answer} and, if wanted, ability and group."""

    name = "vqa"
    rule = "this project; exact match after VQA normalisation"
    answers_format = "JSON lines {question_id, text}"
    annotations_format = "JSON lines or array {question_id, answer}, also question_type or ability, group"
    text_keys = ("text", "answer", "prediction")
    in_annotation_order = True

    def read(self) -> list[Question]:
        questions = []
        for row in read_list(self.path):
            for name in ("question_id", "question", "answer"):
                if not str(row.typed(name, str)).strip():
                    raise BenchmarkError(f"{row.where}: {name!r} is empty")
            questions.append(Question(dict(row), f"{row['question']}\n{OPEN_SUFFIX}", **row.shown()))
        return sorted(questions, key=lambda question: question.images)

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        return (m4c_normalize(text), "exact") if text.strip() else (None, "unparsed")

    def annotations_for(self, predictions: Path) -> Path:
        return self.path

    @classmethod
    def grade(cls, answer: Answer) -> None:
        gold, item = as_text(answer.value("answer", "label")), answer.item
        answer.credit = answer.parsed and same_answer(answer.text, gold)
        answer.part = as_text(item.get("question_type") or item.get("ability") or "all")
        answer.notes = {"gold": gold, "group": as_text(item["group"]) if item.get("group") else None}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        kinds = answers.rates()
        group_of = {a.part: a.notes["group"] for a in answers if a.notes["group"] is not None}
        members: dict[str, list[float]] = {}
        for kind, group in group_of.items():
            members.setdefault(group, []).append(kinds[kind])
        gold = Counter(answer.notes["gold"] for answer in answers)
        majority, count = gold.most_common(1)[0] if gold else ("", 0)
        return {
            "groups": {group: sum(scores) / len(scores) for group, scores in members.items()},
            "counts": answers.cells(),
            "correct": answers.earned,
            "majority_answer": majority,
            "majority_baseline": ratio(count, len(answers)),
            "different_answers": len(gold),
        }
