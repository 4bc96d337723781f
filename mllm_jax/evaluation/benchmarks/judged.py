"""What a GPT model is asked about an answer, and how its reply is read; each judged benchmark says which.

The prompts (`judge_prompts/`) are worded by this project from the published descriptions of the tasks; scores depend
on the wording and on the judge's version, so both are recorded. `--prompt FILE` replaces a prompt by the
official text: the fields in braces are filled in.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mllm_jax.evaluation.predictions import Problems, Row, as_text, match_ids, read_rows, take
from mllm_jax.storage import Path

Fields = dict[str, str]
Files = tuple[Path, Path | None]  # answers (or judgements) and their annotations, if there are some
Case = tuple[str, Fields, dict[str, Any]]  # id, prompt fields, what the stored judgement keeps


@dataclasses.dataclass(frozen=True)
class JudgeTask:
    """One kind of judgement.

    Attributes:
        name: the benchmark; for the Video-ChatGPT scores with the aspect, `video_chatgpt.correctness`.
        model: the judge of the published numbers, as the request's default.
        temperature: of the published protocol; None leaves the endpoint's default.
        max_tokens: most tokens of a reply.
        reply_tokens: a typical reply's length, for the cost estimate.
        system: the system message.
        prompt: name of the user message in `judge_prompts/`, which has fields in braces.
        items: (predictions, annotations, problems) -> the questions to judge.
        parse: a reply -> the judgement, or None if it cannot be read.
    """

    name: str
    model: str
    temperature: float | None
    max_tokens: int
    reply_tokens: int
    system: str
    prompt: str
    items: Callable[[Path, Path | None, Problems], Iterator[Case]]
    parse: Callable[[str], Any]

    @property
    def user(self) -> str:
        """The user message with fields in braces."""
        return _read_prompt(self.prompt)

    def messages(self, fields: Mapping[str, str], user: str | None = None) -> list[dict[str, str]]:
        """The chat messages of one question; `user` replaces the task's own user message."""
        text = self.user if user is None else user
        # One pass, so that braces inside an answer are never taken for a field.
        text = re.sub(r"\{([^{}]*)\}", lambda match: fields.get(match[1], match[0]), text)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": text}]


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to the judge.

    Attributes:
        id: `task:run:question`, unique in a judge folder.
        task: what is asked.
        question: the benchmark's question id.
        run: number of the judge run, from 0.
        body: the chat completion request.
        keep: what the stored judgement needs beside the reply.
    """

    id: str
    task: JudgeTask
    question: str
    run: int
    body: dict[str, Any]
    keep: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identifies model, wording and settings: a reply is reused only for an identical request."""
        return hashlib.sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:16]

    def judgement(self, id_key: str, reply: Mapping[str, Any]) -> dict[str, Any]:
        """The reply as it is stored, with the question's id under `id_key`."""
        facts = {"content": reply["content"], "model": reply.get("model")}
        return {id_key: self.question, **facts, **self.keep}


Judged = tuple[Request, Mapping[str, Any]]  # a request and the judge's reply, which the task can parse


@functools.cache
def _read_prompt(name: str) -> str:
    path = pathlib.Path(__file__).parent / "judge_prompts" / f"{name}.txt"
    return path.read_text(encoding="utf-8").removesuffix("\n")


def texts(row: Row, where: str, **keys: str | tuple[str, ...]) -> Fields:
    """Prompt fields from a row: field -> its key, or several of which the first that is there is taken.

    Raises:
      PredictionError: a key is not there.
    """
    names = {field: (key,) if isinstance(key, str) else key for field, key in keys.items()}
    return {field: as_text(take(row, key, where)) for field, key in names.items()}


def read_answers(
    predictions: Path,
    expected: Iterable[str] | None,
    id_keys: Sequence[str],
    text_keys: Sequence[str],
    problems: Problems,
) -> dict[Any, Row]:
    """One row per question of a file of answers; see `predictions.match_ids`."""
    where = str(predictions)
    return match_ids(
        read_rows(predictions, problems),
        expected,
        lambda row: str(take(row, id_keys, where)),
        lambda row: take(row, text_keys, where),
        problems,
    )


def needed(annotations: Path | None, what: str) -> Path:
    """The annotations.

    Raises:
      ValueError: there are none; says what is needed.
    """
    if annotations is None:
        raise ValueError(f"--annotations is needed: {what}")
    return annotations
