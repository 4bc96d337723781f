"""Judged video benchmarks: MSVD-QA, MSRVTT-QA, ActivityNet-QA and the five Video-ChatGPT scores.

Scores stored judgements (`mllm-jax judge` makes them), as in the Video-ChatGPT evaluation (Maaz et al.
2024): accuracy is the share of "yes" among "yes" and "no" (other verdicts are in neither, and counted
as unparsed); scores are integers 0-5, averaged. A judgement that cannot be read leaves its question
unanswered: the official scripts ask again until all are there.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.answers import Answer, earned, ratio
from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.benchmarks.judged import Case, Judged, JudgeTask, write_lines
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    by_id,
    entries,
    match_ids,
    read_annotation_rows,
    read_json,
    read_rows,
    take,
)

NO_VIDEOS = "models cannot be shown videos yet; `mllm-jax score` scores answers that were made elsewhere"
MAX_SCORE = 5
ASPECTS = {
    "CI": "correctness",
    "DO": "detail",
    "CU": "context",
    "TU": "temporal",
    "CO": "consistency",
}
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


def read_score(judgement: Mapping[str, Any] | None) -> int | None:
    """The integer score 0-5 of a judgement, or None."""
    value = None if judgement is None else judgement.get("score")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        score = int(value)
    except (ValueError, OverflowError):
        return None
    return score if 0 <= score <= MAX_SCORE else None


def read_verdict(judgement: Mapping[str, Any] | None) -> str | None:
    """`yes` or `no` by substring, yes first (as upstream), or None."""
    said = as_text(None if judgement is None else judgement.get("pred")).lower()
    return "yes" if "yes" in said else "no" if "no" in said else None


def _video_items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    ids = None
    if annotations is not None:
        ids = list(by_id(read_annotation_rows(annotations), ("question_id", "id"), annotations))
    found = match_ids(
        read_rows(predictions, problems),
        ids,
        lambda r: str(take(r, ("id", "question_id"), str(predictions))),
        lambda r: take(r, ("pred", "text"), str(predictions)),
        problems,
    )
    for key, row in found.items():
        fields = {
            "question": as_text(take(row, ("question",), f"{predictions}: {key}")),
            "answer": as_text(take(row, ("answer",), f"{predictions}: {key}")),
            "prediction": as_text(take(row, ("pred", "text"), f"{predictions}: {key}")),
        }
        yield key, fields, {}


def _parse_video(reply: str) -> dict[str, Any] | None:
    judgement = parse_judgement(reply)
    return judgement if read_score(judgement) is not None else None


_VIDEO_SYSTEM = (
    "You judge answers to questions about videos. Compare the predicted answer with the correct one: they "
    "match if they mean the same; synonyms and paraphrases are fine."
)
_VIDEO = """Question: {question}
Correct answer: {answer}
Predicted answer: {prediction}

Does the prediction match? Reply only with a Python dict: the key 'pred' with 'yes' or 'no', and the key
'score' with an integer from 0 to 5, 5 for the best match, for example {'pred': 'no', 'score': 1}."""

_ASPECT_FILES = {
    "correctness": "generic_qa",
    "detail": "generic_qa",
    "context": "generic_qa",
    "temporal": "temporal_qa",
    "consistency": "consistency_qa",
}
_ASPECT_RULES = {
    "correctness": "how factually accurate the prediction is against the correct answer, without misreadings",
    "detail": "how complete and how specific the prediction is, compared with the correct answer",
    "context": "how well the prediction fits the overall context and the main themes of the video",
    "temporal": "whether the prediction gets the order of events in the video right",
    "consistency": "whether the two predictions agree with each other and with the correct answer",
}
_ASPECT_REPLY = """
Reply only with a Python dict: the key 'score' with an integer from 0 to 5, 5 for the best, for example
{'score': 3}."""
_ASPECT = f"""Question: {{question}}
Correct answer: {{answer}}
Predicted answer: {{prediction}}
{_ASPECT_REPLY}"""
_ASPECT_TWO = f"""Question 1: {{question}}
Question 2: {{question2}}
Correct answer: {{answer}}
Predicted answer to question 1: {{prediction}}
Predicted answer to question 2: {{prediction2}}
{_ASPECT_REPLY}"""


def _aspect_items(aspect: str) -> Callable[[Path, Path | None, Problems], Iterator[Case]]:
    def items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
        stem = _ASPECT_FILES[aspect]
        places = [predictions / f"{stem}{suffix}" for suffix in (".jsonl", ".json")]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise PredictionError(f"{predictions}: no {stem}.jsonl (or .json) with the model's answers")
        for number, row in enumerate(read_rows(path, problems)):
            where = f"{path}: row {number}"
            fields = {"answer": as_text(take(row, ("A",), where))}
            names = {"question": "Q", "prediction": "pred"}
            if aspect == "consistency":
                names = {"question": "Q1", "question2": "Q2", "prediction": "pred1", "prediction2": "pred2"}
            fields |= {field: as_text(take(row, (key,), where)) for field, key in names.items()}
            yield f"{take(row, ('video_name',), where)}_{number}", fields, {}

    return items


def _aspect_task(aspect: str) -> JudgeTask:
    return JudgeTask(
        name=f"video_chatgpt.{aspect}",
        model="gpt-3.5-turbo",
        temperature=None,
        max_tokens=64,
        reply_tokens=12,
        system=f"You judge answers to questions about videos. Judge {_ASPECT_RULES[aspect]}.",
        user=_ASPECT_TWO if aspect == "consistency" else _ASPECT,
        items=_aspect_items(aspect),
        parse=_parse_video,
    )


class VideoQa(Benchmark):
    """Questions about videos whose answers a judge has compared with the right ones."""

    rule = "Video-ChatGPT evaluate_activitynet_qa.py"
    answers_format = "judgements: JSON id -> [{pred, score}, item], or JSON lines {id, judgement or content}"
    id_keys = ("id", "question_id")
    not_asked = NO_VIDEOS
    stores_text = False

    @classmethod
    def store_judgements(
        cls, folder: Path, judged: Sequence[Judged], predictions: Path, annotations: Path | None
    ) -> tuple[Path, None]:
        rows = [request.judgement("id", reply) for request, reply in judged]
        return write_lines(folder / "judgements.jsonl", rows), None

    @classmethod
    def read_answers(cls, path: Path, problems: Problems) -> list[dict[str, Any]]:
        """Rows {id, judgement, model} of an official file (id -> [judgement, question]) or JSON lines.

        JSON lines hold `id` and either `judgement` (a dict) or `content` (the judge's reply).
        """
        out = []
        value = read_json(path, problems)
        rows = isinstance(value, list) or bool(set(cls.id_keys) & set(value))
        for key, row in entries(value, cls.id_keys, path, problems):
            if not rows:
                row = {"judgement": row[0] if isinstance(row, list) and row else row}
            judgement = row.get("judgement")
            if not isinstance(judgement, dict):
                judgement = parse_judgement(as_text(row.get("content", judgement)))
            out.append({"id": key, "judgement": judgement, "model": row.get("model")})
        return out

    @classmethod
    def read_annotations(cls, path: Path) -> Mapping[Any, Mapping[str, Any]]:
        return by_id(read_annotation_rows(path), ("question_id", "id"), path)

    @classmethod
    def stored(cls, row: Mapping[str, Any], where: str) -> Any:
        return row["judgement"]

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> list[Answer]:
        """The questions with a readable judgement."""
        answers = super().grade_files(predictions, annotations, problems)
        for answer in answers:
            if answer.notes["score"] is None:
                problems.add("missing", f"{predictions.name}: {answer.id}: no readable judgement")
        answers = [answer for answer in answers if answer.notes["score"] is not None]
        if not answers:
            raise PredictionError(f"{predictions}: no readable judgement in it")
        return answers

    @classmethod
    def grade(cls, answer: Answer) -> None:
        verdict = read_verdict(answer.row["judgement"])
        answer.parsed, answer.credit = verdict is not None, verdict == "yes"
        answer.notes["score"] = read_score(answer.row["judgement"])

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        decided, yes = sum(answer.parsed for answer in answers), int(earned(answers))
        return {
            "score": ratio(yes, decided),
            "yes": yes,
            "no": decided - yes,
            "average_score": ratio(sum(answer.notes["score"] for answer in answers), len(answers)),
            "judge_models": sorted({a.row["model"] for a in answers if a.row["model"]}),
        }


def _judge(name: str) -> tuple[JudgeTask]:
    return (
        JudgeTask(
            name, "gpt-3.5-turbo-0125", None, 64, 16, _VIDEO_SYSTEM, _VIDEO, _video_items, _parse_video
        ),
    )


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
    judge = tuple(_aspect_task(aspect) for aspect in ASPECTS.values())

    @classmethod
    def store_judgements(
        cls, folder: Path, judged: Sequence[Judged], predictions: Path, annotations: Path | None
    ) -> tuple[Path, None]:
        for task in cls.judge:
            rows = [request.judgement("id", reply) for request, reply in judged if request.task == task]
            if rows:
                write_lines(folder / f"{task.name.partition('.')[2]}.jsonl", rows)
        return folder, None

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> list[Answer]:
        if not predictions.is_dir():
            names = ", ".join(f"{name}.json" for name in ASPECTS.values())
            raise PredictionError(f"{predictions}: give the folder with the judgements {names} (or .jsonl)")
        answers = []
        for short, aspect in ASPECTS.items():
            places = [predictions / f"{aspect}{suffix}" for suffix in (".json", ".jsonl")]
            path = next((place for place in places if place.is_file()), None)
            if path is None:
                problems.add("missing", f"{aspect}.json")
                continue
            for answer in super().grade_files(path, None, problems):
                answer.notes["aspect"] = short
                answers.append(answer)
        return answers

    @classmethod
    def grade(cls, answer: Answer) -> None:
        answer.notes["score"] = score = read_score(answer.row["judgement"])
        answer.credit = (score or 0) / MAX_SCORE

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        scores: dict[str, list[int]] = {}
        for answer in answers:
            scores.setdefault(answer.notes["aspect"], []).append(answer.notes["score"])
        means = {short: ratio(sum(values), len(values)) for short, values in scores.items()}
        return {
            "score": ratio(sum(means.values()), len(means)),
            "subtasks": means,
            "judge_models": sorted({a.row["model"] for a in answers if a.row["model"]}),
        }
