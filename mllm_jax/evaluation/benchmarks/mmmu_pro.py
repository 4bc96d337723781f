"""MMMU-Pro (Yue et al. 2024b): up to ten options, or question and options inside the image.

The official code draws an unseeded random option for unreadable answers, which nobody can reproduce:
here they count as wrong, are counted, and the accuracy that such draws give on average stands beside
the headline.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, earned, rates, ratio, tally, unread
from mllm_jax.evaluation.benchmarks.base import BenchmarkError, Question
from mllm_jax.evaluation.benchmarks.mmmu_parse import read_options, strip_ends
from mllm_jax.evaluation.benchmarks.published import File, Option, Published, Upload, lettered, value_of
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import PredictionError, Problems, as_text

_HUB = "https://huggingface.co/datasets/MMMU/MMMU_Pro"
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
    text = f" {strip_ends(text)} "
    for occurs, located in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if occurs.format(letter) in text]
        if found:
            return _latest(found, [located.format(letter) for letter in found], text)
    if len(text.split()) > 5:
        lower = text.lower()
        found = [letter for letter, option in options.items() if option.lower() in lower]
        if found:
            return _latest(found, [options[letter].lower() for letter in found], lower)
    return None


def _latest(letters: Sequence[str], needles: Sequence[str], text: str) -> str:
    places = [text.rfind(needle) for needle in needles]
    return letters[places.index(max(places))]


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
            number = str(value_of(row, "id", self.folder))
            try:
                choices = read_options(value_of(row, "options", number))
            except ValueError as error:
                raise BenchmarkError(f"{number}: {error}") from error
            prompt, images = self.prompt(row, choices)
            answer = value_of(row, "answer", number)
            subject = str(value_of(row, "subject", number))
            fields = {"id": number, "subject": subject, "options": choices}
            yield self.question(
                number,
                prompt,
                images,
                answer,
                tuple(LETTERS[: len(choices)]),
                ability=subject,
                fields=fields,
                truth=fields | {"answer": answer},
                interleaved="<image>" in prompt,
            )

    def prompt(self, row: dict[str, Any], choices: list[str]) -> tuple[str, tuple[str, ...]]:
        """Prompt and images, in the order in which the prompt shows them."""
        text = f"{row['question']}\n{lettered(choices)}\n{self.instructions[str(self.values['mode'])]}"
        shown = [f"image_{number}" for number in _MARK.findall(text)]
        images = [value_of(row, name, row["id"]) for name in shown]
        rest = [
            row[name]
            for i in range(1, 8)
            if (name := f"image_{i}") not in shown and row.get(name) is not None
        ]
        text = _MARK.sub("<image>", text)
        if rest and images:  # images that the question does not mention come first
            text = f"{'<image>' * len(rest)}\n{text}"
        return text, (*rest, *images)

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        letter = find_choice(text, dict(zip(question.options, question.row["options"], strict=True)))
        return letter, "unparsed" if letter is None else "letter or option text"

    @classmethod
    def item(cls, row: Mapping[str, Any], annotation: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**row, **annotation}

    @classmethod
    def grade(cls, answer: Answer) -> None:
        try:
            options = dict(zip(LETTERS, read_options(answer.value("options")), strict=False))
        except ValueError as error:
            raise PredictionError(f"{answer.where}: {error}") from error
        choice = find_choice(answer.text, options)
        answer.parsed, answer.credit = choice is not None, choice == answer.value("answer")
        subject = as_text(answer.value("subject"))
        answer.notes = {"options": len(options), "subject": subject, "reading": choice}

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        right = earned(answers)
        cells = tally(answers, lambda a: a.notes["subject"])
        drawn = sum(0.0 if answer.parsed else 1 / answer.notes["options"] for answer in answers)
        return {
            "subtasks": rates(cells, 100),
            "correct": right,
            "counts": cells,
            "random_fallbacks_upstream": unread(answers),
            "expected_score_with_random_fallbacks": ratio(right + drawn, len(answers), 100),
        }

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Any:
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

    def prompt(self, row: dict[str, Any], choices: list[str]) -> tuple[str, tuple[str, ...]]:
        return self.instructions[str(self.values["mode"])], (value_of(row, "image", row["id"]),)
