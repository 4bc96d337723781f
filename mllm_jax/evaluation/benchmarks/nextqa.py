"""NExT-QA multiple choice (Xiao et al. 2021): causal, temporal and descriptive questions about videos.

Follows the official `eval_mc.py`: the type TP (previous / next) is counted as TN (before and after).
"""

from typing import Any

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.benchmarks.video_qa import NO_VIDEOS
from mllm_jax.evaluation.option_match import match_option
from mllm_jax.evaluation.predictions import Row, by_key, take
from mllm_jax.evaluation.table_files import read_whole_table
from mllm_jax.storage import Path

GROUPS = {"Acc_C": ("CW", "CH"), "Acc_T": ("TN", "TC"), "Acc_D": ("DC", "DL", "DO")}


class NextQa(Benchmark):
    """NExT-QA: stored indices 0 to 4, or texts that name one of the five options."""

    name = "nextqa"
    unit = "percent"
    rule = "NExT-QA eval_mc.py"
    answers_format = "JSON <video>_<qid> -> {prediction: 0-4}, or rows {id, prediction} with an index or text"
    annotations_format = "the official CSV (val.csv, test.csv)"
    id_keys = ("id", "question_id")
    text_keys = ("prediction", "text", "answer")
    keyed = True
    not_asked = NO_VIDEOS

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
