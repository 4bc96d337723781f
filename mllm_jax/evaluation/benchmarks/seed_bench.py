"""SEED-Bench-1 (Li et al. 2023): nine image dimensions (the score) and three video ones (kept apart).

An answer is right if it is exactly the letter (the official script and LLaVA's); lmms-eval's reading,
the first character of the stripped text, is printed beside it. The total is over questions, not over
dimensions.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import VIDEOS, Question
from mllm_jax.evaluation.benchmarks.published import (
    LETTER,
    SHORT_TOKENS,
    File,
    Option,
    Published,
    Upload,
    lettered,
)
from mllm_jax.evaluation.grouping import grouped, load_groups
from mllm_jax.evaluation.predictions import BenchmarkError, Row, as_text
from mllm_jax.storage import Path

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
# Where the three data sets that the videos come from keep them: Something-Something v2, EPIC-KITCHENS and Breakfast.
FOLDERS = {
    10: "SSV2/videos",
    11: "EPIC-KITCHENS/3h91syskeag572hl6tvuovwv4d/videos/test",
    12: "BreakfastII_15fps_qvga_sync",
}
_HUB = "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"


def _is_video(key: str, item: Row) -> bool:
    if "data_type" in item:
        return item["data_type"] == "video"
    if "question_type_id" in item:
        return int(item["question_type_id"]) > 9
    return key.startswith("v")


class SeedBench(Published):
    """SEED-Bench-1; asked are the nine dimensions about single images, or (`part`) the three about videos."""

    name = "seed_bench"
    rule = "SEED-Bench eval.py; LLaVA convert_seed_for_submission.py"
    answers_format = "JSON lines {question_id, prediction or text}, without annotations also gt_answer"
    score_options = ("groups",)
    id_keys = ("question_id",)
    text_keys = ("prediction", "text")
    rows_key = "questions"
    max_new_tokens = SHORT_TOKENS
    upload = Upload("{name}.jsonl", "SEED-Bench's leaderboard")
    options: ClassVar = {"part": Option("image", "which questions", ("image", "video", "all"))}
    files: ClassVar = {
        "questions": File(("SEED-Bench.json", "llava-seed-bench.jsonl"), _HUB),
        "images": File(("SEED-Bench-image",), _HUB),
        "videos": File((".",), "DATASET.md of https://github.com/AILab-CVC/SEED-Bench"),
    }

    def items(self) -> Iterator[Question]:
        for row in self.rows("questions", "questions"):
            number = str(row["question_id"])
            medium = row.get("data_type", "video" if number.startswith("v") else "image")
            if self.values["part"] not in (medium, "all"):
                continue
            video = medium == "video"
            if video and "text" in row:
                raise BenchmarkError(
                    f"{row.where}: LLaVA's file shows one frame of each video; part={self.values['part']} needs "
                    f"SEED-Bench.json, from {_HUB}"
                )
            if "text" in row:  # LLaVA's file has no answers
                yield self.question(number, row["text"], [row["image"].split("/")[-1]], options="ABCD")
                continue
            choices = lettered([row[f"choice_{letter}"] for letter in "abcd"])
            fields = {key: row[key] for key in ("question_type_id", "data_type", "segment") if key in row}
            name, shown = str(row["data_id"]), {}
            if video:
                name = f"{FOLDERS[int(row['question_type_id'])]}/{name}"
                shown = {"medium": VIDEOS, "segment": tuple(row["segment"]) if "segment" in row else None}
            yield self.question(
                number,
                f"{row['question']}\n{choices}\n{LETTER}",
                [name],
                row["answer"],
                "ABCD",
                ability=DIMENSIONS[int(row["question_type_id"])] if "question_type_id" in row else "",
                fields=fields,
                truth=fields | {"answer": row["answer"]},
                **shown,
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        return (text, "letter") if text in ("A", "B", "C", "D") else (None, "unparsed")

    @classmethod
    def grade(cls, answer: Answer) -> None:
        gold, item = as_text(answer.value("answer", "gt_answer")), answer.item
        answer.credit = answer.text == gold
        answer.parsed = cls.parse(answer.text, item)[0] is not None
        answer.notes["lmms"] = answer.text.strip()[:1] == gold
        answer.notes["medium"] = "video" if _is_video(str(answer.id), item) else "image"
        if "question_type_id" in item:
            answer.part = DIMENSIONS[int(item["question_type_id"])]

    @classmethod
    def figures(cls, answers: Answers, groups: Path | None = None) -> dict[str, Any]:
        media, cells, means = answers.parts("medium"), answers.cells(), answers.rates()
        image, video = (media.get(name, Answers()) for name in ("image", "video"))
        headline = image or video  # the video questions count where they alone were asked
        inside = {name: cell for name, cell in cells.items() if name in IMAGE}
        grouping = grouped("seed_bench", inside, load_groups(groups))
        summary = {
            name: {"n": len(part), "correct": part.earned, "accuracy": part.mean()}
            for name, part in (("image", image), ("video", video), ("all", answers))
        }
        return {
            "n": len(headline),
            "score": headline.mean(),
            "subtasks": {name: means[name] for name in DIMENSIONS.values() if name in means},
            "groups": grouping["micro"],
            **summary,
            "counts": cells,
            "group_scores": grouping,
            "lmms_image_accuracy": image.mean("lmms"),
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        return [{"question_id": row["question_id"], "prediction": row["text"]} for row in rows]
