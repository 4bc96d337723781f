"""MMMU-Pro (Yue et al. 2024b): up to ten options, or question and options inside the image.

The official code draws an unseeded random option for unreadable answers, which nobody can reproduce:
here they count as wrong, are counted, and the accuracy that such draws give on average stands beside
the headline.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.mmmu_parse import choose, read_options
from mllm_jax.evaluation.benchmarks.published import File, Option, Published, Upload, hub, lettered
from mllm_jax.evaluation.benchmarks.question_files import FileRow
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import Row, as_text

_HUB = hub("MMMU/MMMU_Pro")
_MARK = re.compile(r"<image (\d)>")
_STEPS = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where "
    "LETTER is one of options."
)
_DIRECT = "Answer with the option letter from the given choices directly."


def find_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer names, or None where the official code draws at random.

    After the last "Answer:" a single letter decides. Else candidates are letters in parentheses,
    letters before a blank, letters before a full stop, or, in answers of more than five words, options
    whose text occurs; among several the latest (a letter before a blank or stop is located as a
    free-standing one, as upstream does).

    Example:
        >>> find_choice("So it is B.\\nAnswer: (D)", {"B": "cat", "D": "dog"})
        'D'
    """
    at = text.rfind("Answer:")
    if at != -1:
        tail = text[at + len("Answer:") :].strip()
        named = [letter for letter in options if letter in tail]
        if len(named) == 1:
            return named[0]
    return choose(text, options, (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")))


class MmmuPro(Published):
    """MMMU-Pro: ten (or four) options; images stand where the question mentions them."""

    name = "mmmu_pro"
    unit = "percent"
    rule = "MMMU mmmu-pro/evaluate.py, unreadable answers counted as wrong"
    answers_format = "JSON lines {id, subject, options, answer, response}"
    id_keys = ("id", "question_id")
    text_keys = ("response", "text")
    # The default limit; upstream lets API models write 4096 tokens.
    upload = Upload("output.jsonl", "MMMU-Pro's evaluate.py")
    options: ClassVar = {
        "setting": Option("10 options", "how many options a question has", ("10 options", "4 options")),
        "mode": Option("direct", "upstream's prompt for direct answers or step by step", ("direct", "cot")),
    }
    files: ClassVar = {"questions": File(("standard ({setting})/test-*.parquet",), _HUB)}
    instructions: ClassVar[dict[str, str]] = {
        "direct": _DIRECT,
        "cot": f"Answer the preceding multiple choice question. {_STEPS} Think step by step before answering.",
    }

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            number, subject = str(row["id"]), str(row["subject"])
            choices = read_options(row["options"], row.where)
            prompt, images = self.prompt(row, choices)
            fields = {"id": number, "subject": subject, "options": choices}
            yield self.question(
                number,
                prompt,
                images,
                row["answer"],
                LETTERS[: len(choices)],
                ability=subject,
                fields=fields,
                truth=fields | {"answer": row["answer"]},
                interleaved="<image>" in prompt,
            )

    def prompt(self, row: FileRow, choices: list[str]) -> tuple[str, tuple[str, ...]]:
        """Prompt and images, in the order in which the prompt shows them."""
        text = f"{row['question']}\n{lettered(choices)}\n{self.instructions[str(self.values['mode'])]}"
        shown = [f"image_{number}" for number in _MARK.findall(text)]
        known = [name for i in range(1, 8) if row.get(name := f"image_{i}") is not None]
        others = [name for name in known if name not in shown]
        text = _MARK.sub("<image>", text)
        if others and shown:  # images that the question does not mention come first
            text = f"{'<image>' * len(others)}\n{text}"
        return text, tuple(row[name] for name in others + shown)

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        letter = find_choice(text, dict(zip(LETTERS, item["options"], strict=False)))
        return letter, "unparsed" if letter is None else "letter or option text"

    @classmethod
    def item(cls, row: Row, annotation: Row) -> Row:
        return {**row, **annotation}

    @classmethod
    def grade(cls, answer: Answer) -> None:
        options = read_options(answer.value("options"), answer.where)
        letter, _ = cls.parse(answer.text, {"options": options})
        answer.parsed, answer.credit = letter is not None, letter == answer.value("answer")
        answer.part = as_text(answer.value("subject"))
        answer.notes = {"reading": letter, "drawn": 0.0 if answer.parsed else 1 / len(options)}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        expected = answers.earned + answers.total("drawn")
        return {
            "correct": answers.earned,
            "counts": answers.cells(),
            "random_fallbacks_upstream": answers.unread,
            "expected_score_with_random_fallbacks": ratio(expected, len(answers), 100),
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        return [{**row["truth"], "response": row["text"]} for row in rows]


class MmmuProVision(MmmuPro):
    """MMMU-Pro, vision: question and options are inside the image."""

    name = "mmmu_pro_vision"
    folder_name = "mmmu_pro"
    options: ClassVar = {"mode": MmmuPro.options["mode"]}
    files: ClassVar = {"questions": File(("vision/test-*.parquet",), _HUB)}
    instructions: ClassVar[dict[str, str]] = {
        "direct": f"{_DIRECT} {_STEPS}",
        "cot": f"Write out the multiple-choice question in the image and then solve it. {_STEPS} Think step by "
        "step before answering.",
    }

    def prompt(self, row: FileRow, choices: list[str]) -> tuple[str, tuple[str, ...]]:
        return self.instructions[str(self.values["mode"])], (row["image"],)
