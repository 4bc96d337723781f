"""Questions with one short answer each: the benchmark for a user's own data."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.mini import same_answer
from mllm_jax.evaluation.runners.base import (
    BenchmarkError,
    Question,
    Runner,
    field,
    image_names,
    most_frequent,
    read_list,
)
from mllm_jax.evaluation.vqa_normalize import m4c_normalize
from mllm_jax.mini.world.questions import OPEN_SUFFIX


class VqaRunner(Runner):
    """Rows {question_id, image, question, answer} and, if wanted, ability and group."""

    kind = "vqa"

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

    def is_right(self, row: dict[str, Any]) -> bool:
        return bool(row["text"].strip()) and same_answer(row["text"], row["answer"])

    def score(self, part: str, predictions: Path) -> dict[str, Any]:
        return get_benchmark("vqa").score(predictions, self.path)

    def majority(self, questions: Sequence[Question]) -> list[str]:
        """The most frequent answer of the question's ability (of all questions where none is given)."""
        answers: dict[str, list[str]] = defaultdict(list)
        for question in self.questions:
            answers[question.row.get("ability", "")].append(question.row["answer"])
        first = {ability: most_frequent(texts)[0] for ability, texts in answers.items()}
        return [first[question.row.get("ability", "")] for question in questions]
