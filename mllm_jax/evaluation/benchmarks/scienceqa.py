"""ScienceQA (Lu et al. 2022): one letter; the full test set and its part with images (IMG).

Rule of LLaVA's `eval_science_qa.py`: a bare letter A-E; or a letter followed by ". "; or exactly one match of
"The answer is X." with any character in the place of the full stop (upstream does not escape it).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import LETTER, File, Option, Published, lettered
from mllm_jax.evaluation.benchmarks.question_files import read_json
from mllm_jax.evaluation.option_match import LETTERS as ALL_LETTERS
from mllm_jax.evaluation.predictions import BenchmarkError, Row
from mllm_jax.storage import Path

LETTERS = "ABCDE"
_ANSWER = re.compile(r"The answer is ([A-Z]).")
_SOURCE = "data/scienceqa of https://github.com/lupantech/ScienceQA (images by its tools/download.sh)"


def parse_letter(text: str) -> str | None:
    """The letter that an answer names, or None.

    Example:
        >>> [parse_letter(t) for t in ("B", "C. blue", "So: The answer is D.", "b", "A or B")]
        ['B', 'C', 'D', None, None]
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = _ANSWER.findall(text)
    return found[0] if len(found) == 1 else None


def right_lmms(text: str, answer: str) -> bool:
    """lmms-eval's rule: the text is the letter, or starts with the letter and a full stop."""
    text = text.strip()
    return text == answer or (len(text) >= 2 and text[0].isupper() and text[1] == "." and text[0] == answer)


class ScienceQa(Published):
    """ScienceQA test: all questions, or those with an image (IMG)."""

    name = "scienceqa"
    unit = "percent"
    rule = "LLaVA eval_science_qa.py"
    annotations_format = "JSON id -> {answer, n_choices, has_image}, or ScienceQA's problems.json"
    keyed = True
    options: ClassVar = {"part": Option("all", "all questions, or those with an image", ("all", "img"))}
    files: ClassVar = {
        "questions": File(("problems.json",), _SOURCE),
        "splits": File(("pid_splits.json",), _SOURCE),
        "images": File(("images/test", "test", "images"), _SOURCE),
    }

    def items(self) -> Iterator[Question]:
        problems = {row["_id"]: row for row in self.rows()}
        (path,) = self.paths("splits")
        self.files_read.append(path)
        splits = read_json(path)
        if not isinstance(splits, dict) or not isinstance(splits.get("test"), list):
            raise BenchmarkError(f"{path}: holds no list of the ids of 'test'")
        for number in map(str, splits["test"]):  # the official order
            if number not in problems:
                raise BenchmarkError(f"scienceqa: {self.path}: problem {number} of the test split is missing")
            row = problems[number]
            image = row.get("image")
            if self.values["part"] == "img" and not image:
                continue
            choices, answer = list(map(str, row["choices"])), ALL_LETTERS[int(row["answer"])]
            hint, subject = str(row.get("hint") or "").strip(), str(row.get("subject") or "")
            context = f"Context: {hint}\n" if hint else ""
            known = {
                "answer": answer,
                "n_choices": len(choices),
                "has_image": bool(image),
                "subject": subject,
            }
            yield self.question(
                number,
                f"{context}{row['question']}\n{lettered(choices)}\n{LETTER}",
                [f"{number}/{image}"] if image else [],
                answer,
                ALL_LETTERS[: len(choices)],
                ability=subject,
                truth=known,
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        letter = parse_letter(text)
        return letter, "unparsed" if letter is None else "letter"

    @classmethod
    def read_annotations(cls, path: Path) -> Mapping[Any, Row]:
        gold = super().read_annotations(path)
        return {key: row for key, row in gold.items() if row.get("split", "test") == "test"}

    @classmethod
    def grade(cls, answer: Answer) -> None:
        item, gold = answer.item, answer.value("answer")
        gold = gold if isinstance(gold, str) else LETTERS[gold]
        choices = item["n_choices"] if "n_choices" in item else len(answer.value("choices"))
        image = item["has_image"] if "has_image" in item else bool(item.get("image"))
        letter, _ = cls.parse(answer.text, item)
        offered = letter is not None and letter in LETTERS[:choices]
        answer.parsed, answer.part = letter is not None, "IMG" if image else "TXT"
        answer.credit = offered and letter == gold
        answer.notes = {"not offered": not offered, "lmms": right_lmms(answer.text, gold)}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        parts = answers.parts()
        image, no_choice = parts.get("IMG", Answers()), answers.total("not offered")
        return {
            "subtasks": {name: parts[name].mean(scale=100) for name in ("IMG", "TXT") if name in parts},
            "correct": answers.earned,
            "accuracy": answers.mean(scale=100),
            "img_total": len(image),
            "img_correct": image.earned,
            "img_accuracy": image.mean(scale=100),
            "letter_not_among_the_choices": no_choice - answers.unread,
            "pred_idx_minus1": no_choice,
            "lmms_accuracy": answers.mean("lmms", 100),
        }
