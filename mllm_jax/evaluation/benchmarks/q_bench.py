"""Q-Bench A1 (Wu et al. 2024), English and Chinese: multiple choice on low-level vision.

Answer files are items with a `response`, JSON objects written one after another. The answer is the
letter or the option's text (`match_option`). The paper matches free text with a GPT model instead; with
letters as answers both agree.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import File, Option, Published, Upload, hub, lettered
from mllm_jax.evaluation.option_match import LETTERS, match_option
from mllm_jax.evaluation.predictions import PredictionError, Row, as_text, by_key, read_annotation_rows, take
from mllm_jax.storage import Path

_HUB = hub("nanyangtu/LLVisionQA-QBench")


def _place(answer: Any, options: Sequence[str], where: str) -> int:
    """Which option the right answer is: its text, or a letter.

    Raises:
      PredictionError: it is neither.
    """
    answer = as_text(answer).strip()
    if answer in options:
        return list(options).index(answer)
    if len(answer) == 1 and answer in LETTERS[: len(options)]:
        return LETTERS.index(answer)
    raise PredictionError(f"{where}: the right answer {answer!r} is none of {options}")


def _texts(candidates: Sequence[Any]) -> list[str]:
    return [as_text(one).strip() for one in candidates]


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
            options, gold = _texts(row["candidates"]), row.get("correct_ans")
            fields = {key: value for key, value in row.items() if key not in ("response", "correct_ans")}
            yield self.question(
                index,
                f"{row['question']}{self.instruction}{lettered(row['candidates'])}\n",
                [row["img_path"]],
                None if gold is None else LETTERS[_place(gold, options, row.where)],
                LETTERS[: len(options)],
                fields=fields,
                truth=fields | ({} if gold is None else {"correct_ans": gold}),
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        choice, how = match_option(text, _texts(item["candidates"]))
        return None if choice is None else LETTERS[choice], how

    @classmethod
    def identifier(cls, gold: Any, path: Path) -> Callable[[Row], Hashable]:
        return lambda row: tuple(as_text(take(row, (key,), str(path))) for key in ("img_path", "question"))

    @classmethod
    def read_annotations(cls, path: Path) -> dict[Hashable, Row]:
        return by_key(read_annotation_rows(path), cls.identifier(None, path), path)

    @classmethod
    def grade(cls, answer: Answer) -> None:
        options = _texts(answer.value("candidates"))
        place = _place(answer.value("correct_ans", "answer"), options, answer.where)
        letter, _ = cls.parse(answer.text, answer.item)
        answer.parsed, answer.credit = letter is not None, letter == LETTERS[place]
        answer.notes = {f: f"{f} {answer.item[f]}" for f in ("type", "concern") if f in answer.item}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        subtasks = answers.rates("type") | answers.rates("concern")
        return {"subtasks": subtasks, "correct": answers.earned}

    def submission(self, rows: Sequence[Row]) -> Any:
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
    def read_options(cls, given: Row) -> dict[str, bool | str]:
        values = super().read_options(given)
        return values | {"split_zh": {"dev": "验证集", "test": "测试集"}[str(values["split"])]}

    @property
    def instruction(self) -> str:
        return f"{chr(92) if self.values['backslash'] else chr(10)}在下列选项中选择一个:\n"
