"""Video-ChatGPT's generative benchmark (Maaz et al. 2024): five scores of sentences about 500 ActivityNet videos.

Three of them judge the same answers (`generic_qa.json`) for correctness, detail and context; one those of
`temporal_qa.json`, and one whether the answers to two wordings of a question agree (`consistency_qa.json`). A score is
the mean of whole numbers from 0 to 5.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answers, ratio
from mllm_jax.evaluation.benchmarks.base import VIDEOS, Question, find_file
from mllm_jax.evaluation.benchmarks.judged import Case, Files, Judged, JudgeTask, texts
from mllm_jax.evaluation.benchmarks.published import File, Upload
from mllm_jax.evaluation.benchmarks.video_judgements import (
    SYSTEM,
    JudgedVideos,
    parse_reply,
    write_judgements,
)
from mllm_jax.evaluation.predictions import PredictionError, Problems, Row, take
from mllm_jax.storage import Path, make_folder

ASPECTS = {"CI": "correctness", "DO": "detail", "CU": "context", "TU": "temporal", "CO": "consistency"}
SETS = ("generic", "temporal", "consistency")
_RULES = {
    "correctness": "how factually accurate the prediction is against the correct answer, without misreadings",
    "detail": "how complete and how specific the prediction is, compared with the correct answer",
    "context": "how well the prediction fits the overall context and the main themes of the video",
    "temporal": "whether the prediction gets the order of events in the video right",
    "consistency": "whether the two predictions agree with each other and with the correct answer",
}
_README = "quantitative_evaluation/README.md of https://github.com/mbzuai-oryx/Video-ChatGPT"


def _aspect_items(
    aspect: str, predictions: Path, annotations: Path | None, problems: Problems
) -> Iterator[Case]:
    stem = f"{aspect if aspect in SETS else 'generic'}_qa"
    path = find_file(predictions, stem)
    if path is None:
        raise PredictionError(f"{predictions}: no {stem}.jsonl (or .json) with the model's answers")
    keys = {"answer": "A", "question": "Q", "prediction": "pred"}
    if aspect == "consistency":
        keys |= {"question": "Q1", "question2": "Q2", "prediction": "pred1", "prediction2": "pred2"}
    for number, row in enumerate(reading.read_rows(path, problems)):
        where = f"{path}: row {number}"
        yield f"{take(row, ('video_name',), where)}_{number}", texts(row, where, **keys), {}


def _judge(aspect: str) -> JudgeTask:
    prompt = "video_chatgpt_two" if aspect == "consistency" else "video_chatgpt"
    system = f"{SYSTEM}Judge {_RULES[aspect]}."
    items = functools.partial(_aspect_items, aspect)
    name = f"video_chatgpt.{aspect}"
    return JudgeTask(name, "gpt-3.5-turbo", None, 64, 12, system, prompt, items, parse_reply)


class VideoChatGpt(JudgedVideos):
    """The five Video-ChatGPT scores, a file of judgements each."""

    name = "video_chatgpt"
    unit = "points"
    rule = "Video-ChatGPT evaluate_benchmark_*.py"
    answers_format = "folder with correctness, detail, context, temporal and consistency (.json or .jsonl)"
    parts: ClassVar = ASPECTS
    judge = tuple(map(_judge, ASPECTS.values()))
    upload = Upload("{name}", "`mllm-jax judge video_chatgpt`, or Video-ChatGPT's evaluate_benchmark_*.py")
    files: ClassVar = {
        "questions": File(("generic_qa.json",), _README),
        "temporal": File(("temporal_qa.json",), _README),
        "consistency": File(("consistency_qa.json",), _README),
        "videos": File(("Test_Videos", "VideoChatGPT_Test_Videos", "videos"), _README),
    }

    def items(self) -> Iterator[Question]:
        for name in SETS:
            for number, row in enumerate(self.rows("questions" if name == "generic" else name)):
                fields = {"set": name, "number": number, "official": dict(row)}
                keys = ("Q1", "Q2") if name == "consistency" else ("Q",)
                for key in keys:
                    yield self.question(
                        f"{name}_{number}{key[1:] and '_'}{key[1:]}",
                        row[key],
                        [row["video_name"]],
                        row["A"],
                        fields={**fields, "key": key},
                        medium=VIDEOS,
                    )

    def write_submission(self, rows: Sequence[Row], path: Path) -> None:
        """A folder with the three official files, answers (`pred`, or `pred1` and `pred2`) in them."""
        make_folder(path)
        for name in SETS:
            said: dict[int, Row] = {}
            for row in rows:
                if row["set"] == name:
                    answers = said.setdefault(row["number"], dict(row["official"]))
                    answers[f"pred{row['key'][1:]}"] = row["text"]
            files.write_json_lines(path / f"{name}_qa.jsonl", [said[number] for number in sorted(said)])

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        for task in cls.judge:
            if own := [pair for pair in judged if pair[0].task == task]:
                write_judgements(folder / f"{task.name.partition('.')[2]}.jsonl", own)
        return folder, None

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        """Judgements hold all that counts: questions and answers, if given, are not read."""
        return super().grade_files(predictions, None, problems)

    @classmethod
    def figures(cls, answers: Answers, **options: Any) -> dict[str, Any]:
        means = {short: part.mean("score") for short, part in answers.parts().items()}
        return {
            "score": ratio(sum(means.values()), len(means)),
            "subtasks": means,
            **super().figures(answers),
        }
