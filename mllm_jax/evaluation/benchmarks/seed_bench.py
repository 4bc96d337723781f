"""SEED-Bench-1 (Li et al. 2023): nine image dimensions (the score) and three video ones (kept apart).

An answer is right if it is exactly the letter (the official script and LLaVA's); lmms-eval's reading,
the first character of the stripped text, is printed beside it. The total is over questions, not over
dimensions.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, earned, rates, ratio, tally, unread
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import (
    LETTER,
    SHORT_TOKENS,
    File,
    Published,
    Upload,
    lettered,
    value_of,
)
from mllm_jax.evaluation.grouping import grouped, load_groups
from mllm_jax.evaluation.predictions import Problems, as_text

DIMENSIONS = {
    1: "Scene Understanding",
    2: "Instance Identity",
    3: "Instance Attributes",
    4: "Instance Location",
    5: "Instances Counting",
    6: "Spatial Relation",
    7: "Instance Interaction",
    8: "Visual Reasoning",
    9: "Text Understanding",
    10: "Action Recognition",
    11: "Action Prediction",
    12: "Procedure Understanding",
}
IMAGE = frozenset(DIMENSIONS[i] for i in range(1, 10))
_HUB = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"


def _is_video(key: str, item: Mapping[str, Any]) -> bool:
    if "data_type" in item:
        return item["data_type"] == "video"
    if "question_type_id" in item:
        return int(item["question_type_id"]) > 9
    return key.startswith("v")


class SeedBench(Published):
    """SEED-Bench-1; asked are the nine dimensions about single images, the video questions are left out."""

    name = "seed_bench"
    rule = "SEED-Bench eval.py; LLaVA convert_seed_for_submission.py"
    answers_format = (
        "JSON lines {question_id, prediction or text}, with gt_answer where there are no annotations"
    )
    score_options = ("groups",)
    id_keys = ("question_id",)
    text_keys = ("prediction", "text")
    rows_key = "questions"
    max_new_tokens = SHORT_TOKENS
    upload = Upload("{name}.jsonl", "SEED-Bench's leaderboard")
    files: ClassVar = {
        "questions": File(("SEED-Bench.json", "llava-seed-bench.jsonl"), _HUB),
        "images": File(("SEED-Bench-image",), _HUB),
    }

    def items(self) -> Iterator[Question]:
        for row in self.rows("questions", "questions"):
            number = str(value_of(row, "question_id", self.path))
            where = f"question {number}"
            if row.get("data_type", "video" if number.startswith("v") else "image") != "image":
                continue
            if "text" in row:  # LLaVA's file has no answers
                image = row["image"].split("/")[-1]
                yield self.question(number, row["text"], (image,), options=tuple("ABCD"))
                continue
            choices = [value_of(row, f"choice_{letter}", where) for letter in "abcd"]
            fields = {key: row[key] for key in ("question_type_id", "data_type") if key in row}
            answer = value_of(row, "answer", where)
            yield self.question(
                number,
                f"{row['question']}\n{lettered(choices)}\n{LETTER}",
                (str(value_of(row, "data_id", where)),),
                answer,
                tuple("ABCD"),
                ability=DIMENSIONS[int(row["question_type_id"])] if "question_type_id" in row else "",
                fields=fields,
                truth=fields | {"answer": answer},
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return (text, "letter") if text in question.options else (None, "unparsed")

    @classmethod
    def grade(cls, answer: Answer) -> None:
        gold, item = as_text(answer.value("answer", "gt_answer")), answer.item
        answer.credit = answer.text == gold
        answer.parsed = answer.text in ("A", "B", "C", "D")
        answer.notes["lmms"] = answer.text.strip()[:1] == gold
        answer.notes["part"] = "video" if _is_video(str(answer.id), item) else "image"
        if "question_type_id" in item:
            answer.notes["dimension"] = DIMENSIONS[int(item["question_type_id"])]

    @classmethod
    def figures(
        cls, answers: Sequence[Answer], problems: Problems, groups: Path | None = None
    ) -> dict[str, Any]:
        parts = tally(answers, lambda a: a.notes["part"])
        cells = tally(answers, lambda a: a.notes.get("dimension"))
        grouping = grouped(
            "seed_bench", {name: cell for name, cell in cells.items() if name in IMAGE}, load_groups(groups)
        )
        image, video = parts.get("image", [0, 0]), parts.get("video", [0, 0])
        every = [earned(answers), len(answers)]
        summary = {
            name: {"n": n, "correct": right, "accuracy": ratio(right, n)}
            for name, (right, n) in (("image", image), ("video", video), ("all", every))
        }
        return {
            "n": image[1],
            "unparsed": unread(answers),
            "score": ratio(*image),
            "subtasks": rates({name: cells[name] for name in DIMENSIONS.values() if name in cells}),
            "groups": grouping["micro"],
            **summary,
            "counts": cells,
            "group_scores": grouping,
            "lmms_image_accuracy": rates(tally(answers, lambda a: a.notes["part"], "lmms")).get("image", 0.0),
        }

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return [{"question_id": row["question_id"], "prediction": row["text"]} for row in rows]
