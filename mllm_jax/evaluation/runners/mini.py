"""The project's own benchmark: every question under all rotations of its options, and without options."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.mini import judge_row
from mllm_jax.evaluation.option_match import match_option
from mllm_jax.evaluation.runners.base import (
    MAIN,
    OPEN,
    BenchmarkError,
    Question,
    Runner,
    field,
    image_names,
    most_frequent,
    read_list,
)
from mllm_jax.evaluation.vqa_normalize import m4c_normalize
from mllm_jax.mini.world.questions import CHOICE_SUFFIX, LETTERS, OPEN_SUFFIX, rotations


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """Question, lettered options and the request to answer with one of them, in words."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question}\n{lines}\n{CHOICE_SUFFIX}"


class MiniRunner(Runner):
    """Rows {question_id, image, ability, group, question, options, answer}, one per question."""

    kind = "mini"

    def read(self) -> list[Question]:
        questions = []
        for index, row in enumerate(read_list(self.path)):
            for name in ("question_id", "ability", "group", "question", "answer"):
                field(row, name, str, self.path, index)
            options = field(row, "options", list, self.path, index)
            if row["answer"] not in options or not 2 <= len(set(options)) == len(options) <= len(LETTERS):
                raise BenchmarkError(
                    f"{self.path}: entry {row['question_id']!r}: 'options' must be 2 to {len(LETTERS)} different "
                    f"texts with the answer {row['answer']!r} among them, found {options!r}"
                )
            images = image_names(row, self.path, index)
            for turn, rotated in enumerate(rotations(options)):
                kept = row | {"rotation": turn, "options": list(rotated)}
                questions.append(
                    Question(kept, choice_prompt(row["question"], rotated), images, tuple(rotated))
                )
            kept = row | {"rotation": 0, "options": []}
            questions.append(Question(kept, f"{row['question']}\n{OPEN_SUFFIX}", images, part=OPEN))
        return sorted(
            questions, key=lambda question: question.images
        )  # the same picture's prompts together; stable

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        if question.part == OPEN:
            return (m4c_normalize(text), "open") if text.strip() else (None, "unparsed")
        index, how = match_option(text, question.options)
        return None if index is None else question.options[index], how

    def is_right(self, row: dict[str, Any]) -> bool:
        return judge_row(row)[0]

    def score(self, part: str, predictions: Path) -> dict[str, Any]:
        return get_benchmark("mini").score(predictions)

    def majority(self, questions: Sequence[Question]) -> list[str]:
        """Per ability the most frequent right answer; among options, the one that is most often right."""
        answers: dict[str, list[str]] = defaultdict(list)
        for question in self.questions:
            if question.part == MAIN and question.row["rotation"] == 0:
                answers[question.row["ability"]].append(question.row["answer"])
        ranked = {ability: most_frequent(texts) for ability, texts in answers.items()}
        found = []
        for question in questions:
            order = ranked[question.row["ability"]]
            offered = (
                [answer for answer in order if answer in question.options] if question.options else order
            )
            found.append(offered[0])
        return found
