"""What judged benchmarks about videos have in common: a GPT model's replies, read as the Video-ChatGPT scripts do.

A reply is a Python dict with a score from 0 to 5 and, for question answering, `pred` (yes or no). The prompt asks for a
whole number, but its own example shows 4.8, so that decimals come too; the scripts cut them to whole numbers. A reply
that cannot be read leaves its question unanswered: the scripts ask again until all are there.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

from mllm_jax import files
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Unanswered
from mllm_jax.evaluation.benchmarks.judged import Judged
from mllm_jax.evaluation.benchmarks.published import Published
from mllm_jax.evaluation.predictions import PredictionError, Problems, Row, as_text
from mllm_jax.storage import Path

MAX_SCORE = 5
MAX_NEW_TOKENS = 512  # Dense Connector's; FreeVA stops at 128
SYSTEM = "You judge answers to questions about videos. "
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


def parse_reply(reply: str) -> dict[str, Any] | None:
    """The judgement in a reply, None without a score that can be read."""
    judgement = parse_judgement(reply)
    return judgement if read_score(judgement) is not None else None


class JudgedVideos(Published):
    """Questions about videos, answered in sentences that a judge compares with the right ones."""

    answers_format = "judgements: JSON id -> [{pred, score}, item], or JSON lines {id, judgement or content}"
    id_keys = ("id", "question_id")
    stores_text = False
    judged = True
    max_new_tokens = MAX_NEW_TOKENS

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        return (text, "text") if text.strip() else (None, "unparsed")

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
        score = read_score(answer.row["judgement"])
        if score is None:
            raise Unanswered("no readable judgement")
        said = answer.row["judgement"]["score"]
        answer.notes |= {"score": score, "decimal": isinstance(said, float) and said != score}
        answer.credit = score / MAX_SCORE

    @classmethod
    def figures(cls, answers: Answers, **options: Any) -> dict[str, Any]:
        """Which models judged, and how many of their scores were cut to whole numbers."""
        models = sorted({answer.row["model"] for answer in answers if answer.row["model"]})
        return {"judge_models": models, "decimal_scores": answers.total("decimal")}


def write_judgements(path: Path, judged: Sequence[Judged]) -> None:
    """Replies as `JudgedVideos.read_answers` takes them."""
    files.write_json_lines(path, [request.judgement("id", reply) for request, reply in judged])
