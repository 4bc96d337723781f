"""Judge requests of a benchmark, their cost, and the stored judgements in the form that the scorer reads.

A judge folder holds `requests.jsonl` (OpenAI's batch format, so that it may also be uploaded),
`answers.jsonl` (one line per reply, with the judge's exact version) and `judged/`, which the benchmark
scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax import files
from mllm_jax.evaluation.benchmarks import JUDGE_TASKS, get_benchmark
from mllm_jax.evaluation.benchmarks.base import UNUSABLE
from mllm_jax.evaluation.benchmarks.judged import Request
from mllm_jax.evaluation.predictions import Problems, read_json
from mllm_jax.storage import Path

REQUESTS, ANSWERS, SUMMARY = "requests.jsonl", "answers.jsonl", "judge.json"
_CHARACTERS_PER_TOKEN = 4  # English text; the estimate says "about"


def build_requests(
    benchmark: str,
    predictions: Path,
    annotations: Path | None,
    problems: Problems,
    model: str | None = None,
    runs: int = 1,
    user: str | None = None,
) -> list[Request]:
    """Every request of a benchmark.

    Args:
        benchmark: a key of `JUDGE_TASKS`.
        predictions: the model's answers.
        annotations: the benchmark's annotations.
        problems: what the reader meets.
        model: the judge; the one of the published numbers if None.
        runs: judge runs per question (LLaVA-Bench's published numbers are means of three).
        user: another user message with the task's fields in braces.

    Raises:
        ValueError: the benchmark is not a judged one, `runs` is not positive, or a file has fields of other types.
    """
    if benchmark not in JUDGE_TASKS:
        raise ValueError(
            f"{benchmark!r} needs no judge; judged benchmarks are {', '.join(sorted(JUDGE_TASKS))}"
        )
    if runs < 1:
        raise ValueError(f"runs must be at least 1, not {runs}")
    requests = []
    for task in JUDGE_TASKS[benchmark]:
        try:
            items = list(task.items(predictions, annotations, problems))
        except ValueError:
            raise
        except UNUSABLE as error:
            files_read = " with ".join(str(path) for path in (predictions, annotations) if path is not None)
            raise ValueError(f"{files_read}: cannot be judged: {type(error).__name__}: {error}") from error
        for run in range(runs):
            for question, fields, keep in items:
                body: dict[str, Any] = {
                    "model": model or task.model,
                    "messages": task.messages(fields, user),
                    "max_tokens": task.max_tokens,
                }
                if task.temperature is not None:
                    body["temperature"] = task.temperature
                name = f"{task.name}:{run}:{question}"
                requests.append(Request(name, task, question, run, body, keep))
    return requests


def write_requests(path: Path, requests: Sequence[Request]) -> None:
    """Writes OpenAI batch lines; an existing file with other requests is not overwritten.

    Raises:
        ValueError: the file exists and differs.
    """
    url = "/v1/chat/completions"
    lines = [{"custom_id": r.id, "method": "POST", "url": url, "body": r.body} for r in requests]
    text = "".join(files.json_text(line) + "\n" for line in lines)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path} holds other requests (answers, model or prompt changed); use a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def estimate(
    requests: Sequence[Request], price_in: float | int | None = None, price_out: float | int | None = None
) -> dict[str, Any]:
    """About how many tokens the requests take, and what they cost.

    Args:
        requests: what is still to be sent.
        price_in: price of a million input tokens, in any currency.
        price_out: of a million output tokens.

    Returns:
        `requests`, `input_tokens`, `output_tokens`, and `cost`, None without prices.
    """
    characters = sum(len(m["content"]) for r in requests for m in r.body["messages"])
    tokens_in = characters // _CHARACTERS_PER_TOKEN + 8 * len(requests)
    tokens_out = sum(r.task.reply_tokens for r in requests)
    cost = None
    if price_in is not None and price_out is not None:
        cost = (tokens_in * price_in + tokens_out * price_out) / 1e6
    return {"requests": len(requests), "input_tokens": tokens_in, "output_tokens": tokens_out, "cost": cost}


def checked_reply(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A judge's reply with every field of its type, from an endpoint or a stored line; what is not is left out (None).

    Args:
        facts: `content`, `model`, `fingerprint`, `created`, `usage`.

    Raises:
        ValueError: the content is no text.
    """
    if not isinstance(facts.get("content"), str):
        raise ValueError(f"the judge's reply is no text but {facts.get('content')}")
    usage = facts.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = {
        key: usage[key] for key in ("prompt_tokens", "completion_tokens") if type(usage.get(key)) is int
    }
    created = facts.get("created")
    return {
        "content": facts["content"],
        **{key: facts[key] if isinstance(facts.get(key), str) else None for key in ("model", "fingerprint")},
        "created": created if type(created) is int else None,
        "usage": counts or None,
    }


def read_answers(path: Path, requests: Sequence[Request]) -> dict[str, dict[str, Any]]:
    """Readable replies by request id; unreadable ones are asked again.

    Raises:
        ValueError: a reply belongs to a request with another wording or model.
    """
    if not path.is_file() or not path.stat().st_size:
        return {}
    known = {r.id: r for r in requests}
    answers = {}
    stored = read_json(path, Problems())
    for row in stored if isinstance(stored, list) else [stored]:
        name = row.get("id") if isinstance(row, dict) else None
        request = known.get(name) if isinstance(name, str) else None
        if request is None:
            continue
        if row.get("digest") != request.digest:
            raise ValueError(f"{path}: {request.id} was asked with another model or prompt; use a new folder")
        try:
            reply = checked_reply(row)
        except ValueError:
            continue
        if request.task.parse(reply["content"]) is not None:
            answers[request.id] = {"requested": str(row.get("requested")), **reply}
    return answers


def summary(benchmark: str, answers: Mapping[str, Mapping[str, Any]], runs: int) -> dict[str, Any]:
    """Which judge answered: requested and returned model names, fingerprints, dates and tokens."""
    rows = list(answers.values())
    usage = [row.get("usage") or {} for row in rows]
    return {
        "benchmark": benchmark,
        "runs": runs,
        "judge_requested": sorted({row["requested"] for row in rows}),
        "judge_returned": dict(Counter(str(row.get("model")) for row in rows)),
        "system_fingerprints": sorted({row["fingerprint"] for row in rows if row.get("fingerprint")}),
        "first_reply": min((row["created"] for row in rows if row.get("created")), default=None),
        "last_reply": max((row["created"] for row in rows if row.get("created")), default=None),
        "prompt_tokens": sum(u.get("prompt_tokens") or 0 for u in usage),
        "completion_tokens": sum(u.get("completion_tokens") or 0 for u in usage),
    }


def store_judgements(
    folder: Path,
    benchmark: str,
    requests: Sequence[Request],
    answers: Mapping[str, Mapping[str, Any]],
    predictions: Path,
    annotations: Path | None,
) -> tuple[Path, Path | None]:
    """Writes the replies in the form that the benchmark scores, and returns the files to score."""
    folder.mkdir(parents=True, exist_ok=True)
    judged = [(request, answers[request.id]) for request in requests if request.id in answers]
    return get_benchmark(benchmark).store_judgements(folder, judged, (predictions, annotations))
