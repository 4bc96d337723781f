"""MMMU validation and MMMU-Pro, read from the hub's Parquet files."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks import mmmu_pro
from mllm_jax.evaluation.benchmarks.mmmu_parse import find_choice
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.runners.base import BenchmarkError, Question
from mllm_jax.evaluation.runners.published import (
    LETTER,
    LONG_TOKENS,
    SHORT,
    SHORT_TOKENS,
    File,
    Item,
    Option,
    Published,
    lettered,
    value_of,
)
from mllm_jax.inference.beam_sampling import Sampling

CHOICE = "multiple-choice"
_MARK = re.compile(r"<image (\d)>")


class Mmmu(Published):
    """MMMU validation as Dense Connector questions it; only the first picture of a question is shown.

    Upstream samples (temperature 1, five beams, seed 42), so that its numbers vary. The default here is greedy, as for
    every other benchmark; `decoding=sampled` decodes like upstream, with draws of our own (`beam_sampling.py`).
    """

    kind = "mmmu"
    max_new_tokens = SHORT_TOKENS
    options: ClassVar = {
        "decoding": Option("greedy", "greedy, or upstream's five sampled beams", ("greedy", "sampled"), True),
        "seed": Option("42", "of sampled answers, a whole number", decoding=True),
    }
    files: ClassVar = {
        "questions": File(("*/validation-*.parquet",), "https://huggingface.co/datasets/MMMU/MMMU")
    }

    @property
    def sampling(self) -> Sampling | None:
        """Five beams at temperature 1 over the 50 best tokens of each, if asked for."""
        return Sampling(seed=int(self.values["seed"])) if self.values["decoding"] == "sampled" else None

    @classmethod
    def read_options(cls, given: Mapping[str, bool | str]) -> dict[str, bool | str]:
        values = super().read_options(given)
        if not re.fullmatch(r"[0-9]+", str(values["seed"])):
            raise BenchmarkError(f"{cls.kind}: option 'seed': {values['seed']!r} is no whole number")
        if (
            values["decoding"] == "greedy"
            and "seed" in given
            and given["seed"] != cls.options["seed"].default
        ):
            raise BenchmarkError(f"{cls.kind}: a seed says nothing of greedy answers; add decoding=sampled")
        return values

    def items(self) -> Iterator[Item]:
        for path in self.paths("questions"):
            for row in self.read_table(path):
                yield self._item(row, path)

    def _item(self, row: dict[str, Any], path: Path) -> Item:
        number = str(value_of(row, "id", str(path)))
        question, kind = value_of(row, "question", number), row.get("question_type", CHOICE)
        choices = read_options(row.get("options"), number) if kind == CHOICE else []
        answer = _answer(value_of(row, "answer", number), kind)
        asked = f"\n{lettered(choices, '({}) {}')}\n\n{LETTER}" if choices else f"\n{SHORT}"
        return Item(
            number,
            f"{question}{asked}",
            (value_of(row, "image_1", number),),
            answer,
            tuple(LETTERS[: len(choices)]),
            ability=path.parent.name,
            kept={"id": number, "options": choices},
            truth={"id": number, "question_type": kind, "ground_truth": answer, "options": choices},
        )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        if not question.options:
            return super().parse(question, text)
        choices = dict(zip(question.options, question.row["options"], strict=True))
        letter = find_choice(text, list(choices), choices)
        return letter, "unparsed" if letter is None else "letter or option text"


class MmmuPro(Published):
    """MMMU-Pro: ten (or four) options; pictures stand where the question mentions them."""

    kind = "mmmu_pro"
    scorer = "mmmu_pro"
    max_new_tokens = LONG_TOKENS  # upstream lets API models write 4096 tokens
    options: ClassVar = {
        "setting": Option("10 options", "how many options a question has", ("10 options", "4 options")),
        "mode": Option("direct", "upstream's prompt for direct answers or step by step", ("direct", "cot")),
    }
    _HUB = "https://huggingface.co/datasets/MMMU/MMMU_Pro"
    files: ClassVar = {"questions": File(("standard ({setting})/test-*.parquet",), _HUB)}
    _STEPS = (
        "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where "
        "LETTER is one of options."
    )
    instructions: ClassVar[dict[str, str]] = {
        "direct": "Answer with the option letter from the given choices directly.",
        "cot": f"Answer the preceding multiple choice question. {_STEPS} Think step by step before answering.",
    }

    def items(self) -> Iterator[Item]:
        for row in self.rows():
            number = str(value_of(row, "id", str(self.folder)))
            choices = read_options(value_of(row, "options", number), number)
            prompt, images = self.question(row, choices)
            answer = value_of(row, "answer", number)
            subject = str(value_of(row, "subject", number))
            kept = {"id": number, "subject": subject, "options": choices}
            yield Item(
                number,
                prompt,
                images,
                answer,
                tuple(LETTERS[: len(choices)]),
                ability=subject,
                kept=kept,
                truth=kept | {"answer": answer},
                interleaved="<image>" in prompt,
            )

    def question(self, row: dict[str, Any], choices: list[str]) -> tuple[str, tuple[str, ...]]:
        """Prompt and pictures, in the order in which the prompt shows them."""
        text = f"{row['question']}\n{lettered(choices)}\n{self.instructions[str(self.values['mode'])]}"
        shown = [f"image_{number}" for number in _MARK.findall(text)]
        images = [value_of(row, name, str(row["id"])) for name in shown]
        rest = [
            row[name]
            for i in range(1, 8)
            if (name := f"image_{i}") not in shown and row.get(name) is not None
        ]
        text = _MARK.sub("<image>", text)
        if rest and images:  # pictures that the question does not mention come first
            text = f"{'<image>' * len(rest)}\n{text}"
        return text, (*rest, *images)

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        letter = mmmu_pro.find_choice(text, dict(zip(question.options, question.row["options"], strict=True)))
        return letter, "unparsed" if letter is None else "letter or option text"


class MmmuProVision(MmmuPro):
    """MMMU-Pro, vision: question and options are inside the picture."""

    kind = "mmmu_pro_vision"
    home = "mmmu_pro"
    options: ClassVar = {"mode": MmmuPro.options["mode"]}
    files: ClassVar = {"questions": File(("vision/test-*.parquet",), MmmuPro._HUB)}
    instructions: ClassVar[dict[str, str]] = {
        "direct": f"{MmmuPro.instructions['direct']} {MmmuPro._STEPS}",
        "cot": f"Write out the multiple-choice question in the image and then solve it. {MmmuPro._STEPS} Think step by "
        "step before answering.",
    }

    def question(self, row: dict[str, Any], choices: list[str]) -> tuple[str, tuple[str, ...]]:
        return self.instructions[str(self.values["mode"])], (value_of(row, "image", str(row["id"])),)


def read_options(value: Any, where: str) -> list[str]:
    """Options that a data set stores as a list or as the text of a Python list.

    Raises:
      BenchmarkError: neither; or none, or more than there are letters.
    """
    try:
        options = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError) as error:
        raise BenchmarkError(f"{where}: options are no list: {value[:60]!r}") from error
    if not isinstance(options, list) or not 0 < len(options) <= len(LETTERS):
        raise BenchmarkError(
            f"{where}: options must be a list of 1 to {len(LETTERS)} texts, found {value!r:.60}"
        )
    return [str(option) for option in options]


def _answer(value: Any, kind: str) -> str | list[str]:
    """Open questions may have several right answers, stored as the text of a list."""
    text = str(value)
    if kind != CHOICE and text.startswith("["):
        try:
            return [str(answer) for answer in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return text  # an interval or a vector is one answer
    return text
