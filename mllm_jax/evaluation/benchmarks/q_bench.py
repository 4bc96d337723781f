"""Q-Bench A1 (Wu et al. 2024), English and Chinese: multiple choice on low-level vision.

Answer files are items with a `response`, JSON objects written one after another. The answer is the
letter or the option's text (`match_option`). The paper matches free text with a GPT model instead; with
letters as answers both agree.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, earned, rates, tally
from mllm_jax.evaluation.benchmarks.base import BenchmarkError, Question
from mllm_jax.evaluation.benchmarks.published import File, Option, Published, Upload, lettered, value_of
from mllm_jax.evaluation.option_match import LETTERS, match_option
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    read_annotation_rows,
    take,
)

_HUB = "https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"


def _place(answer: str, options: Sequence[str]) -> int | None:
    """Which option the right answer is: its text, or a letter; None if it is neither."""
    answer = answer.strip()
    if answer in options:
        return list(options).index(answer)
    return LETTERS.index(answer) if len(answer) == 1 and answer in LETTERS[: len(options)] else None


class QBench(Published):
    """Q-Bench A1, English; the test answers are not public."""

    name = "q_bench"
    rule = "Q-Bench A1 accuracy, letters or option texts"
    answers_format = "JSON objects {img_path, question, candidates, response}, also correct_ans"
    text_keys = ("response", "text")
    upload = Upload("answers.jsonl", "Q-Bench's leaderboard")
    options: ClassVar = {"split": Option("dev", "which questions", ("dev", "test"))}
    files: ClassVar = {
        "questions": File(("llvisionqa_{split}.json",), _HUB),
        "images": File(("images_llvisionqa", "images_llviqionqa"), _HUB),
    }

    @property
    def instruction(self) -> str:
        """What stands between question and options."""
        return "\nChoose between one of the options as follows:\n"

    def items(self) -> Iterator[Question]:
        for index, row in enumerate(self.rows()):
            where = f"{self.path}: entry #{index}"
            candidates = [str(c) for c in value_of(row, "candidates", where)]
            gold, letter = row.get("correct_ans"), None
            if gold is not None:
                place = _place(str(gold), [c.strip() for c in candidates])
                if place is None:
                    raise BenchmarkError(f"{where}: the right answer {gold!r} is none of {candidates}")
                letter = LETTERS[place]
            fields = {key: value for key, value in row.items() if key not in ("response", "correct_ans")}
            yield self.question(
                index,
                f"{value_of(row, 'question', where)}{self.instruction}{lettered(candidates)}\n",
                (value_of(row, "img_path", where),),
                letter,
                tuple(LETTERS[: len(candidates)]),
                fields=fields,
                truth=fields | ({} if gold is None else {"correct_ans": gold}),
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        choice, how = match_option(text, [str(c).strip() for c in question.row["candidates"]])
        return None if choice is None else LETTERS[choice], how

    @classmethod
    def identifier(
        cls, gold: Mapping[Any, Any] | None, path: Path
    ) -> Callable[[Mapping[str, Any]], Hashable]:
        return lambda row: tuple(as_text(take(row, (key,), str(path))) for key in ("img_path", "question"))

    @classmethod
    def read_annotations(cls, path: Path) -> dict[Hashable, Mapping[str, Any]]:
        rows = read_annotation_rows(path)
        gold = {cls.identifier(None, path)(row): row for row in rows}
        if len(gold) != len(rows):
            raise PredictionError(f"{path}: a question about one image occurs twice")
        return gold

    @classmethod
    def grade(cls, answer: Answer) -> None:
        options = [as_text(o).strip() for o in answer.value("candidates")]
        gold = as_text(answer.value("correct_ans", "answer")).strip()
        place = _place(gold, options)
        if place is None:
            raise PredictionError(f"{answer.where}: the right answer {gold!r} is none of {options}")
        choice, _ = match_option(answer.text, options)
        answer.parsed, answer.credit = choice is not None, choice == place

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        subtasks = {}
        for field in ("type", "concern"):
            cells = tally(answers, lambda a, f=field: f"{f} {a.item[f]}" if f in a.item else None)
            subtasks |= rates(cells)
        return {
            "subtasks": subtasks,
            "correct": earned(answers),
        }

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return [{**row["truth"], "response": row["text"]} for row in rows]


class QBenchZh(QBench):
    """Q-Bench A1, Chinese."""

    name = "q_bench_zh"
    folder_name = "q_bench"
    options: ClassVar = QBench.options | {
        # Upstream's string reads "\在下列..." instead of a line break and the sentence.
        "backslash": Option(True, "upstream's prompt with its stray backslash; false: a line break"),
    }
    files: ClassVar = QBench.files | {
        "questions": File(("质衡-问答-{split_zh}.json", "llvisionqa_zh_{split}.json"), _HUB)
    }

    @classmethod
    def read_options(cls, given: Mapping[str, bool | str]) -> dict[str, bool | str]:
        values = super().read_options(given)
        return values | {"split_zh": {"dev": "验证集", "test": "测试集"}[str(values["split"])]}

    @property
    def instruction(self) -> str:
        return f"{chr(92) if self.values['backslash'] else chr(10)}在下列选项中选择一个:\n"
