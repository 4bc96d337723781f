"""Sends judge requests to an OpenAI-compatible endpoint: backoff, resumable, key from the environment."""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.judge.requests import Request
from mllm_jax.files import no_links

RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
_LONGEST_WAIT = 60.0  # seconds


class JudgeError(RuntimeError):
    """The endpoint refuses, or keeps failing; what was answered so far is stored."""


class Client:
    """A chat completion endpoint.

    Args:
        base_url: up to and without `/chat/completions`, e.g. `https://api.openai.com/v1`.
        key_variable: name of the environment variable with the key; no header is sent if it is not set.
        retries: further attempts per request after a transient failure.
        first_wait: seconds before the first of them; doubled each time, with jitter.
        timeout: seconds per attempt.

    Raises:
        ValueError: the base URL is not http or https.
    """

    def __init__(
        self,
        base_url: str,
        key_variable: str = "OPENAI_API_KEY",
        retries: int = 6,
        first_wait: float | int = 1.0,
        timeout: float | int = 120.0,
    ) -> None:
        if not base_url.startswith(("https://", "http://")):
            raise ValueError(f"--base-url must start with https:// or http://, not {base_url!r}")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.key = os.environ.get(key_variable, "")
        self.retries, self.first_wait, self.timeout = retries, first_wait, timeout

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One chat completion, as the endpoint's JSON.

        Raises:
            JudgeError: the endpoint refuses, or fails on every attempt; never shows the key.
        """
        for attempt in range(self.retries + 1):
            delay = min(_LONGEST_WAIT, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                with error:
                    text = error.read(300).decode(errors="replace")
                    after = error.headers.get("Retry-After", "")
                if error.code not in RETRIED:
                    raise JudgeError(f"{self.url}: HTTP {error.code}: {text}") from None
                reason = f"HTTP {error.code}: {text}"
                if after.isdigit():
                    delay = min(_LONGEST_WAIT, float(after))
            except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
                reason = str(error)
            if attempt < self.retries:
                time.sleep(delay)
        raise JudgeError(f"{self.url}: failed {self.retries + 1} times, last: {reason}")

    def _once(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = json.loads(response.read())
        if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list) or not reply["choices"]:
            raise ValueError(f"no choices in the reply: {str(reply)[:200]}")
        return reply


def send(
    requests: Sequence[Request],
    path: Path,
    client: Client,
    workers: int = 4,
    attempts: int = 3,
    progress: Callable[[], None] | None = None,
) -> int:
    """Sends requests and appends each reply to `path` at once, so that a stopped run loses nothing.

    Args:
        requests: what is still unanswered.
        path: the answers file (JSON lines).
        client: the endpoint.
        workers: requests in flight.
        attempts: how often a request is asked until its reply can be read.
        progress: called after each reply.

    Returns:
        How many replies could not be read in the end.

    Raises:
        JudgeError: the endpoint refuses or keeps failing. Replies so far are stored.
    """
    lock, stop = threading.Lock(), threading.Event()
    unreadable = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    _finish_last_line(path)

    def work(request: Request) -> None:
        nonlocal unreadable
        for attempt in range(attempts):
            if stop.is_set():
                return
            try:
                row = _row(request, client.complete(request.body))
            except Exception:
                stop.set()  # no request is sent after a refusal, not even by this thread
                raise
            readable = request.task.parse(row["content"]) is not None
            if readable or attempt == attempts - 1:
                break
        with lock:
            with open(path, "a", encoding="utf-8", opener=no_links) as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            unreadable += not readable
            if progress is not None:
                progress()

    with ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(work, request) for request in requests]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future.exception() for future in finished if future.exception() is not None]
        for future in futures if failed else ():
            future.cancel()
    if failed:
        raise failed[0]
    return unreadable


def _row(request: Request, reply: dict[str, Any]) -> dict[str, Any]:
    message = reply["choices"][0].get("message") or {}
    return {
        "id": request.id,
        "digest": request.digest,
        "content": message.get("content") or "",
        "requested": request.body["model"],
        "model": reply.get("model"),
        "fingerprint": reply.get("system_fingerprint"),
        "created": reply.get("created"),
        "usage": reply.get("usage"),
    }


def _finish_last_line(path: Path) -> None:
    """A run that was killed may have left half a line: start the next reply on a line of its own."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+", opener=no_links) as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
