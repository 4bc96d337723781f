"""Judged video benchmarks: MSVD-QA, MSRVTT-QA, ActivityNet-QA and the five Video-ChatGPT scores.

Scores stored judgements (`mllm-jax judge` makes them), as in the Video-ChatGPT evaluation (Maaz et al.
2024): accuracy is the share of "yes" among "yes" and "no" (other verdicts are in neither, and counted
as unparsed); scores are integers 0-5, averaged. A judgement that cannot be read leaves its question
unanswered: the official scripts ask again until all are there.
"""

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Benchmark, Unanswered, find_file
from mllm_jax.evaluation.benchmarks.judged import Case, Files, Judged, JudgeTask, read_answers, texts
from mllm_jax.evaluation.predictions import PredictionError, Problems, Row, as_text, take
from mllm_jax.storage import Path

NO_VIDEOS = "models cannot be shown videos yet; `mllm-jax score` scores answers that were made elsewhere"
MAX_SCORE = 5
ASPECTS = {"CI": "correctness", "DO": "detail", "CU": "context", "TU": "temporal", "CO": "consistency"}
_DICT = re.compile(r"\{[^{}]*\}")


def parse_judgement(text: str) -> dict[str, Any] | None:
    """The Python dict in a judge's reply, or None.

    Example:
        >>> parse_judgement("{'pred': 'yes', 'score': 4}")
        {'pred': 'yes', 'score': 4}
    """
    for candidate in (text.strip(), *_DICT.findall(text)):
        try:
            value = ast.literal_eval(candidate)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(value, dict):
            return value
    return None


def read_score(judgement: Row | None) -> int | None:
    """The integer score 0-5 of a judgement, or None."""
    value = None if judgement is None else judgement.get("score")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        score = int(value)
    except (ValueError, OverflowError):
        return None
    return score if 0 <= score <= MAX_SCORE else None


def read_verdict(judgement: Row | None) -> str | None:
    """`yes` or `no` by substring, yes first (as upstream), or None."""
    said = as_text(None if judgement is None else judgement.get("pred")).lower()
    return "yes" if "yes" in said else "no" if "no" in said else None


def _video_items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    gold, said = None if annotations is None else VideoQa.read_annotations(annotations), ("pred", "text")
    for key, row in read_answers(predictions, gold, VideoQa.id_keys, said, problems).items():
        yield (
            key,
            texts(row, f"{predictions}: {key}", question="question", answer="answer", prediction=said),
            {},
        )


def _aspect_items(
    aspect: str, predictions: Path, annotations: Path | None, problems: Problems
) -> Iterator[Case]:
    stem = {"temporal": "temporal_qa", "consistency": "consistency_qa"}.get(aspect, "generic_qa")
    path = find_file(predictions, stem)
    if path is None:
        raise PredictionError(f"{predictions}: no {stem}.jsonl (or .json) with the model's answers")
    keys = {"answer": "A", "question": "Q", "prediction": "pred"}
    if aspect == "consistency":
        keys |= {"question": "Q1", "question2": "Q2", "prediction": "pred1", "prediction2": "pred2"}
    for number, row in enumerate(reading.read_rows(path, problems)):
        where = f"{path}: row {number}"
        yield f"{take(row, ('video_name',), where)}_{number}", texts(row, where, **keys), {}


def _parse_video(reply: str) -> dict[str, Any] | None:
    judgement = parse_judgement(reply)
    return judgement if read_score(judgement) is not None else None


_SYSTEM = "You judge answers to questions about videos. "
_MATCH = (
    "Compare the predicted answer with the correct one: they match if they mean the same; synonyms and paraphrases are "
    "fine."
)
_ASPECT_RULES = {
    "correctness": "how factually accurate the prediction is against the correct answer, without misreadings",
    "detail": "how complete and how specific the prediction is, compared with the correct answer",
    "context": "how well the prediction fits the overall context and the main themes of the video",
    "temporal": "whether the prediction gets the order of events in the video right",
    "consistency": "whether the two predictions agree with each other and with the correct answer",
}


def _judge(name: str) -> tuple[JudgeTask]:
    model, system = "gpt-3.5-turbo-0125", _SYSTEM + _MATCH
    return (JudgeTask(name, model, None, 64, 16, system, "video_qa", _video_items, _parse_video),)


def _judge_aspect(aspect: str) -> JudgeTask:
    prompt = "video_chatgpt_two" if aspect == "consistency" else "video_chatgpt"
    system = f"{_SYSTEM}Judge {_ASPECT_RULES[aspect]}."
    items = functools.partial(_aspect_items, aspect)
    name = f"video_chatgpt.{aspect}"
    return JudgeTask(name, "gpt-3.5-turbo", None, 64, 12, system, prompt, items, _parse_video)


class VideoQa(Benchmark):
    """Questions about videos whose answers a judge has compared with the right ones."""

    rule = "Video-ChatGPT evaluate_activitynet_qa.py"
    answers_format = "judgements: JSON id -> [{pred, score}, item], or JSON lines {id, judgement or content}"
    id_keys = ("id", "question_id")
    not_asked = NO_VIDEOS
    stores_text = False

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        rows = [request.judgement("id", reply) for request, reply in judged]
        files.write_json_lines(folder / "judgements.jsonl", rows)
        return folder / "judgements.jsonl", None

    @classmethod
    def read_answers(cls, path: Path, problems: Problems) -> list[dict[str, Any]]:
        """Rows {id, judgement, model} of an official file (id -> [judgement, question]) or JSON lines.

        JSON lines hold `id` and either `judgement` (a dict) or `content` (the judge's reply).
        """
        out = []
        value = reading.read_json(path, problems)
        rows = isinstance(value, list) or bool(set(cls.id_keys) & set(value))
        for key, row in reading.entries(value, cls.id_keys, path, problems):
            if not rows:
                row = {"judgement": row[0] if isinstance(row, list) and row else row}
            judgement = row.get("judgement")
            if not isinstance(judgement, dict):
                judgement = parse_judgement(as_text(row.get("content", judgement)))
            out.append({"id": key, "judgement": judgement, "model": row.get("model")})
        return out

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Row]:
        return reading.by_id(reading.read_annotation_rows(path), ("question_id", "id"), path)

    @classmethod
    def stored(cls, row: Row, where: str) -> Any:
        return row["judgement"]

    @classmethod
    def match(cls, rows: Any, gold: Any, predictions: Path, *rest: Any) -> Answers:
        answers = super().match(rows, gold, predictions, *rest)
        if not answers:
            raise PredictionError(f"{predictions}: no readable judgement in it")
        return answers

    @classmethod
    def grade(cls, answer: Answer) -> None:
        verdict = read_verdict(answer.row["judgement"])
        answer.parsed, answer.credit = verdict is not None, verdict == "yes"
        answer.notes["score"] = _score(answer)

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        decided, yes = sum(answer.parsed for answer in answers), int(answers.earned)
        return {
            "score": ratio(yes, decided),
            "yes": yes,
            "no": decided - yes,
            "average_score": answers.mean("score"),
            "judge_models": _models(answers),
        }


def _score(answer: Answer) -> int:
    score = read_score(answer.row["judgement"])
    if score is None:
        raise Unanswered("no readable judgement")
    return score


def _models(answers: Answers) -> list[str]:
    return sorted({answer.row["model"] for answer in answers if answer.row["model"]})


class MsvdQa(VideoQa):
    """MSVD-QA."""

    name = "msvd_qa"
    judge = _judge(name)


class MsrvttQa(VideoQa):
    """MSRVTT-QA."""

    name = "msrvtt_qa"
    judge = _judge(name)


class ActivityNetQa(VideoQa):
    """ActivityNet-QA."""

    name = "activitynet_qa"
    judge = _judge(name)


class VideoChatGpt(VideoQa):
    """The five Video-ChatGPT scores, a file of judgements each."""

    name = "video_chatgpt"
    unit = "points"
    rule = "Video-ChatGPT evaluate_benchmark_*.py"
    answers_format = "folder with correctness, detail, context, temporal and consistency (.json or .jsonl)"
    parts: ClassVar = ASPECTS
    judge = tuple(map(_judge_aspect, ASPECTS.values()))

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        for task in cls.judge:
            rows = [request.judgement("id", reply) for request, reply in judged if request.task == task]
            if rows:
                files.write_json_lines(folder / f"{task.name.partition('.')[2]}.jsonl", rows)
        return folder, None

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        """Judgements hold all that counts: questions and answers, if given, are not read."""
        return super().grade_files(predictions, None, problems)

    @classmethod
    def grade(cls, answer: Answer) -> None:
        answer.notes["score"] = score = _score(answer)
        answer.credit = score / MAX_SCORE

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        means = {short: part.mean("score") for short, part in answers.parts().items()}
        score = ratio(sum(means.values()), len(means))
        return {"score": score, "subtasks": means, "judge_models": _models(answers)}
