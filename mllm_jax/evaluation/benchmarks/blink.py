"""BLINK (Fu et al. 2024): 14 visual perception tasks; the total is the mean of the task accuracies.

The answer files hold final letters in parentheses; an answer is right if it is exactly the annotated one.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import LETTER, File, Option, Published, Upload, hub
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import PredictionError, Row, as_text

_ID = re.compile(r"(?:val|test)_(.+)_\d+")
_FINAL = re.compile(r"\([A-D]\)")
# The order of the official table; the total's last digit depends on the order of summation.
TASKS = (
    "Visual_Similarity Counting Relative_Depth Jigsaw Art_Style Functional_Correspondence Semantic_Correspondence "
    "Spatial_Relation Object_Localization Visual_Correspondence Multi-view_Reasoning Relative_Reflectance "
    "Forensic_Detection IQ_Test"
).split()


class Blink(Published):
    """BLINK validation: up to four images, options as "(A)"."""

    name = "blink"
    rule = "BLINK eval/evaluate.py"
    answers_format = 'JSON object id -> "(A)", or rows {id, answer}'
    annotations_format = 'val_answers.json: id -> "(A)"'
    id_keys = ("id",)
    text_keys = ("answer", "prediction", "text")
    keyed = True
    upload = Upload("{name}.json", "BLINK's eval/evaluate.py")
    options: ClassVar = {
        # The data set's own `prompt` lists the options. Upstream lets a GPT model read the letter from free answers;
        # the usual instruction makes that needless.
        "instruction": Option(True, "append the usual request for a letter to the data set's prompt"),
    }
    files: ClassVar = {"questions": File(("*/val-*.parquet",), hub("BLINK-Benchmark/BLINK"))}

    def items(self) -> Iterator[Question]:
        suffix = f"\n{LETTER}" if self.values["instruction"] else ""
        for row in self.rows():
            number = str(row["idx"])
            yield self.question(
                number,
                f"{str(row['prompt']).rstrip()}{suffix}",
                [row[f"image_{i}"] for i in range(1, 5) if row.get(f"image_{i}") is not None],
                row["answer"],
                [f"({letter})" for letter in LETTERS[: len(row["choices"])]],
                ability=number.split("_", 1)[1].rsplit("_", 1)[0],
                fields={"id": number},
                truth={"id": number, "answer": row["answer"]},
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        """The one letter that the answer is, starts with, or has in parentheses."""
        first = re.match(r"\(?([A-D])\)?(?![A-Za-z'’])", text.strip())
        named = {first[1]} if first else set(re.findall(r"\(([A-D])\)", text))
        found = [option for option in item["options"] if option[1] in named]
        return (found[0], "letter") if len(found) == 1 else (None, "unparsed")

    def extra_fields(self, text: str, parsed: str | None) -> dict[str, Any]:
        return {"prediction": parsed or text}

    @classmethod
    def grade(cls, answer: Answer) -> None:
        name = _ID.fullmatch(str(answer.id))
        if name is None:
            raise PredictionError(f"{answer.where}: the id has no task name in it (val_<task>_<number>)")
        answer.part = name[1]
        answer.credit = answer.text == as_text(answer.value("answer"))
        answer.parsed = _FINAL.fullmatch(answer.text) is not None

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        tasks = answers.rates()
        order = [t for t in TASKS if t in tasks] + [t for t in tasks if t not in TASKS]
        return {
            "score": ratio(sum(tasks[t] for t in order), len(order)),
            "subtasks": {t: tasks[t] for t in order},
            "micro_accuracy": answers.mean(),
            "counts": answers.cells(),
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        return {row["id"]: row["prediction"] for row in rows}
