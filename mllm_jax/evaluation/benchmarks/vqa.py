"""Short answers with one reference each: exact match after normalisation, with the majority baseline.

The benchmark for a user's own data (`easy_vqa`, `nlvr`, ...).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.answers import Answer, earned, rates, ratio, tally
from mllm_jax.evaluation.benchmarks.base import Benchmark, BenchmarkError, Question
from mllm_jax.evaluation.benchmarks.mini import same_answer
from mllm_jax.evaluation.benchmarks.question_files import field, image_names, read_list
from mllm_jax.evaluation.predictions import Problems, as_text
from mllm_jax.evaluation.vqa_normalize import m4c_normalize
from mllm_jax.mini.world.questions import OPEN_SUFFIX


class Vqa(Benchmark):
    """Rows {question_id, image, question, answer} and, if wanted, ability and group."""

    name = "vqa"
    rule = "this project; exact match after VQA normalisation"
    answers_format = "JSON lines {question_id, text}"
    annotations_format = (
        "JSON lines or array {question_id, answer}, optionally question_type or ability, group"
    )
    text_keys = ("text", "answer", "prediction")
    in_annotation_order = True

    def read(self) -> list[Question]:
        questions = []
        for index, row in enumerate(read_list(self.path)):
            for name in ("question_id", "question", "answer"):
                if not str(field(row, name, str, self.path, index)).strip():
                    which = row["question_id"] or f"#{index}"
                    raise BenchmarkError(f"{self.path}: entry {which!r}: {name!r} is empty")
            images = image_names(row, self.path, index)
            questions.append(Question(dict(row), f"{row['question']}\n{OPEN_SUFFIX}", images))
        return sorted(questions, key=lambda question: question.images)

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return (m4c_normalize(text), "exact") if text.strip() else (None, "unparsed")

    def annotations_for(self, predictions: Path) -> Path:
        return self.path

    @classmethod
    def grade(cls, answer: Answer) -> None:
        gold = as_text(answer.value("answer", "label"))
        answer.credit = answer.parsed and same_answer(answer.text, gold)
        answer.notes["kind"] = as_text(
            answer.item.get("question_type") or answer.item.get("ability") or "all"
        )

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        cells = tally(answers, lambda a: a.notes["kind"])
        group_of = {a.notes["kind"]: as_text(a.item["group"]) for a in answers if a.item.get("group")}
        members: dict[str, list[float]] = {}
        for kind, value in rates(cells).items():
            if kind in group_of:
                members.setdefault(group_of[kind], []).append(value)
        gold = Counter(as_text(answer.value("answer", "label")) for answer in answers)
        majority, count = gold.most_common(1)[0] if gold else ("", 0)
        return {
            "subtasks": rates(cells),
            "groups": {group: sum(scores) / len(scores) for group, scores in members.items()},
            "counts": cells,
            "correct": earned(answers),
            "majority_answer": majority,
            "majority_baseline": ratio(count, len(answers)),
            "different_answers": len(gold),
        }
