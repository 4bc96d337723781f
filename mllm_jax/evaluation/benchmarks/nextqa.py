"""NExT-QA multiple choice (Xiao et al. 2021): causal, temporal and descriptive questions about videos.

Follows the official `eval_mc.py`: the type TP (previous / next) is counted as TN (before and after).
"""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
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
from mllm_jax.evaluation.benchmarks.question_files import read_json
from mllm_jax.evaluation.option_match import match_option
from mllm_jax.evaluation.predictions import Row, by_key, take
from mllm_jax.evaluation.table_files import read_whole_table
from mllm_jax.storage import Path

COLUMNS = ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")
_PAGE = "https://github.com/doc-doc/NExT-QA"
GROUPS = {"Acc_C": ("CW", "CH"), "Acc_T": ("TN", "TC"), "Acc_D": ("DC", "DL", "DO")}


class NextQa(Published):
    """NExT-QA: five options, each with its letter; answers that name one, or stored indices 0 to 4."""

    name = "nextqa"
    unit = "percent"
    rule = "NExT-QA eval_mc.py"
    answers_format = "JSON <video>_<qid> -> {prediction: 0-4}, or rows {id, prediction} with an index or text"
    annotations_format = "the official CSV (val.csv, test.csv)"
    id_keys = ("id", "question_id")
    text_keys = ("prediction", "text", "answer")
    keyed = True
    max_new_tokens = SHORT_TOKENS
    annotations_name = "annotations.csv"
    upload = Upload("{name}.json", "NExT-QA's eval_mc.py")
    options: ClassVar = {"split": Option("val", "which questions", ("val", "test"))}
    files: ClassVar = {
        "questions": File(("{split}.csv", "dataset/nextqa/{split}.csv"), _PAGE),
        "folders": File(("map_vid_vidorID.json", "dataset/nextqa/map_vid_vidorID.json"), _PAGE, needed=False),
        "videos": File(("NExTVideo", "videos"), _PAGE),
    }

    def items(self) -> Iterator[Question]:
        for path in self.paths("folders"):  # videos may lie as VidOR numbers them, `1164/3238737531.mp4`
            self.video_files.elsewhere |= {key: str(value) for key, value in read_json(path).items()}
        for row in self.rows():
            options, video = [row[f"a{i}"] for i in range(5)], str(row["video"])
            number, right = f"{video}_{row['qid']}", int(row["answer"])
            yield self.question(
                number,
                f"{row['question'].strip()}\n{lettered(options)}\n{LETTER}",
                [video],
                "ABCDE"[right],
                "ABCDE",
                ability={"TP": "TN"}.get(row["type"], row["type"]),
                truth={name: row[name] for name in COLUMNS},
                medium=VIDEOS,
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        options = [item[f"a{i}"] for i in range(5)]
        index, how = match_option(text, options)
        return None if index is None else "ABCDE"[index], how

    def write_annotations(self, questions: Sequence[Question], path: Path) -> None:
        """The official table of these questions."""
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, COLUMNS)
        table.writeheader()
        table.writerows(question.row["truth"] for question in questions)
        files.write_text(path, text.getvalue())

    def submission(self, rows: Sequence[Row]) -> Any:
        return {
            row["question_id"]: {
                "prediction": -1 if row["parsed"] is None else "ABCDE".index(row["parsed"]),
                "answer": int(row["truth"]["answer"]),
            }
            for row in rows
        }

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Row]:
        def key_of(row: Row) -> str:
            return f"{take(row, ('video', 'video_id'), str(path))}_{take(row, ('qid',), str(path))}"

        return by_key(read_whole_table(path), key_of, path)

    @classmethod
    def grade(cls, answer: Answer) -> None:
        stored = cls.stored(answer.row, answer.where)
        if isinstance(stored, int) and not isinstance(stored, bool):
            choice = stored if 0 <= stored < 5 else None
        elif answer.text.strip() in ("0", "1", "2", "3", "4"):
            choice = int(answer.text)
        else:
            choice = match_option(answer.text, [answer.value(f"a{i}") for i in range(5)])[0]
        answer.parsed = choice is not None
        answer.credit = choice == int(answer.value("answer"))
        answer.part = {"TP": "TN"}.get(answer.value("type"), answer.value("type"))

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        cells = answers.cells()
        groups = {
            name: [sum(cells[k][i] for k in kinds if k in cells) for i in (0, 1)]
            for name, kinds in GROUPS.items()
        }
        return {
            "score": ratio(100 * answers.earned, len(answers)),
            "subtasks": {name: ratio(100 * right, n) for name, (right, n) in cells.items()},
            "correct": answers.earned,
            "question_groups": {name: ratio(100 * right, n) for name, (right, n) in groups.items()},
            "question_group_counts": groups,
            "counts": cells,
        }
