"""Open questions about videos: MSVD-QA, MSRVTT-QA, ActivityNet-QA and TGIF-QA, judged as in Video-ChatGPT.

Accuracy is the share of "yes" among the judge's "yes" and "no" (other verdicts are in neither, and counted as
unparsed); the second figure is the mean of its scores.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import VIDEOS, Question
from mllm_jax.evaluation.benchmarks.judged import Case, Files, Judged, JudgeTask, read_answers, texts
from mllm_jax.evaluation.benchmarks.published import File, Upload
from mllm_jax.evaluation.benchmarks.video_judgements import (
    SYSTEM,
    JudgedVideos,
    parse_reply,
    read_verdict,
    write_judgements,
)
from mllm_jax.evaluation.predictions import BenchmarkError, Problems, Row
from mllm_jax.storage import Path

_MATCH = (
    "Compare the predicted answer with the correct one: they match if they mean the same; synonyms and paraphrases are "
    "fine."
)


def _judged(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    gold, said = None if annotations is None else VideoQa.read_annotations(annotations), ("pred", "text")
    for key, row in read_answers(predictions, gold, VideoQa.id_keys, said, problems).items():
        yield (
            key,
            texts(row, f"{predictions}: {key}", question="question", answer="answer", prediction=said),
            {},
        )


def _judge(name: str) -> tuple[JudgeTask]:
    model, system = "gpt-3.5-turbo-0125", SYSTEM + _MATCH
    return (JudgeTask(name, model, None, 64, 16, system, "video_qa", _judged, parse_reply),)


def _files(folder: str, *videos: str) -> dict[str, File]:
    """The files of Video-LLaVA's collection, which Dense Connector's and FreeVA's scripts read as well."""
    where = f"{folder} of GPT_Zero_Shot_QA, https://github.com/PKU-YuanGroup/Video-LLaVA"
    return {
        "questions": File(("test_q.json",), where),
        "answers": File(("test_a.json",), where),
        "videos": File(videos, where),
    }


class VideoQa(JudgedVideos):
    """The question alone; the right answer is a word or two."""

    rule = "Video-ChatGPT evaluate_activitynet_qa.py"
    upload = Upload("{name}.jsonl", "`mllm-jax judge`, or Video-ChatGPT's evaluate_activitynet_qa.py")

    def items(self) -> Iterator[Question]:
        questions, answers = self.rows(), self.rows("answers")
        if len(questions) != len(answers):
            raise BenchmarkError(
                f"{self.name}: {len(questions)} questions, but {len(answers)} answers; the two files belong together "
                "line by line: fetch both again"
            )
        for row, right in zip(questions, answers, strict=True):
            number = str(row["question_id"])
            if (other := str(right.get("question_id", number))) != number:
                raise BenchmarkError(
                    f"{right.where}: stands where the answer to {number!r} is expected, not {other!r}"
                )
            fields = {"question": str(row["question"]), "answer": str(right["answer"])}
            yield self.question(
                number,
                fields["question"],
                [str(row["video_name"])],
                fields["answer"],
                fields=fields,
                truth=fields,
                medium=VIDEOS,
            )

    def submission(self, rows: Sequence[Row]) -> Any:
        return [
            {
                "id": row["question_id"],
                "question": row["question"],
                "answer": row["answer"],
                "pred": row["text"],
            }
            for row in rows
        ]

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Row]:
        return reading.by_id(reading.read_annotation_rows(path), ("question_id", "id"), path)

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        write_judgements(folder / "judgements.jsonl", judged)
        return folder / "judgements.jsonl", None

    @classmethod
    def grade(cls, answer: Answer) -> None:
        super().grade(answer)
        verdict = read_verdict(answer.row["judgement"])
        answer.parsed, answer.credit = verdict is not None, verdict == "yes"

    @classmethod
    def figures(cls, answers: Answers, **options: Any) -> dict[str, Any]:
        decided, yes = sum(answer.parsed for answer in answers), int(answers.earned)
        return {
            "score": ratio(yes, decided),
            "yes": yes,
            "no": decided - yes,
            "average_score": answers.mean("score"),
            **super().figures(answers),
        }


class MsvdQa(VideoQa):
    """MSVD-QA."""

    name = "msvd_qa"
    judge = _judge(name)
    files: ClassVar = _files("MSVD_Zero_Shot_QA", "videos")


class MsrvttQa(VideoQa):
    """MSRVTT-QA."""

    name = "msrvtt_qa"
    judge = _judge(name)
    files: ClassVar = _files("MSRVTT_Zero_Shot_QA", "videos/all", "videos")


class ActivityNetQa(VideoQa):
    """ActivityNet-QA, whose questions name videos without the `v_` of their files."""

    name = "activitynet_qa"
    judge = _judge(name)
    video_prefix = "v_"
    files: ClassVar = _files("Activitynet_Zero_Shot_QA", "all_test", "videos")


class TgifQa(VideoQa):
    """TGIF-QA, its questions about a frame."""

    name = "tgif_qa"
    judge = _judge(name)
    files: ClassVar = _files("TGIF_Zero_Shot_QA", "mp4", "videos")
