"""Sends judge requests to an OpenAI-compatible endpoint: backoff, resumable, key from the environment.

The key goes to the address that was given and nowhere else: redirects are refused, plain http:// is for this machine
unless it is asked for, and the key is blotted out of whatever is printed or stored.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mllm_jax.escape import terminal
from mllm_jax.evaluation.benchmarks.judged import Request
from mllm_jax.evaluation.judge.requests import checked_reply
from mllm_jax.files import json_text, no_links
from mllm_jax.storage import Path

RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
_LONGEST_WAIT = 60.0  # seconds
_LONGEST_REPLY, _LONGEST_ERROR = 16 << 20, 1 << 16  # bytes
_SHOWN = 300  # characters of an error's body


class JudgeError(RuntimeError):
    """The endpoint refuses, or keeps failing; what was answered so far is stored."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Refuses, so that a redirect is an error like others: urllib would send the key along."""


def _endpoint(base_url: str, insecure_http: bool) -> str:
    """The address of chat completions.

    Raises:
        ValueError: an address that the key must not be sent to; never shows credentials in it.
    """
    try:
        parts = urllib.parse.urlsplit(base_url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("--base-url is no address; an example is https://api.openai.com/v1") from None
    if parts.username is not None or parts.query or parts.fragment or not host or not base_url.isprintable():
        raise ValueError(
            f"--base-url must be a host and a path without user, password or query, as in https://{host or 'host'}/v1; "
            "the key is read from the environment (--key-variable)"
        )
    if parts.scheme not in ("https", "http"):
        raise ValueError(f"--base-url must start with https:// or http://, not {parts.scheme!r}")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if parts.scheme == "http" and not local and not insecure_http:
        raise ValueError(
            f"http://{host} would send the key and the answers readable for everyone between; use https://, or say "
            "--insecure-http if the network can be trusted"
        )
    return base_url.rstrip("/") + "/chat/completions"


def _key(variable: str) -> str:
    key = os.environ.get(variable, "")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"the key in {variable} holds a blank, a line break or another character that no key has; set it again"
        )
    return key


class Client:
    """A chat completion endpoint.

    Args:
        base_url: up to and without `/chat/completions`, e.g. `https://api.openai.com/v1`.
        key_variable: name of the environment variable with the key; no header is sent if it is not set.
        retries: further attempts per request after a transient failure.
        first_wait: seconds before the first of them; doubled each time, with jitter.
        timeout: seconds per attempt.
        insecure_http: allow plain http:// to another machine.

    Raises:
        ValueError: an address or key that cannot be used; shows neither key nor credentials.
    """

    def __init__(
        self,
        base_url: str,
        key_variable: str = "OPENAI_API_KEY",
        retries: int = 6,
        first_wait: float | int = 1.0,
        timeout: float | int = 120.0,
        insecure_http: bool = False,
    ) -> None:
        self.url = _endpoint(base_url, insecure_http)
        self.key = _key(key_variable)
        self.retries, self.first_wait, self.timeout = retries, first_wait, timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def redacted(self, text: str) -> str:
        """Text from the endpoint without the key and without terminal commands."""
        return terminal(text.replace(self.key, "[key]") if self.key else text)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One chat completion.

        Returns:
            `content`, `model`, `fingerprint`, `created`, `usage`; see `requests.checked_reply`.

        Raises:
            JudgeError: the endpoint refuses, or fails on every attempt; never shows the key.
        """
        for attempt in range(self.retries + 1):
            delay = min(_LONGEST_WAIT, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                with error:
                    text = self.redacted(error.read(_LONGEST_ERROR).decode(errors="replace"))[:_SHOWN]
                    after = error.headers.get("Retry-After", "")
                reason = f"HTTP {error.code}: {text}"
                if 300 <= error.code < 400:
                    reason += " (redirects are not followed; give the final address as --base-url)"
                if error.code not in RETRIED:
                    raise JudgeError(f"{self.url}: {reason}") from None
                if after.isascii() and after.isdigit():
                    delay = min(_LONGEST_WAIT, float(after))
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                reason = self.redacted(str(error) or type(error).__name__)[:_SHOWN]
            if attempt < self.retries:
                time.sleep(delay)
        raise JudgeError(f"{self.url}: failed {self.retries + 1} times, last: {reason}")

    def _once(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        with self._opener.open(request, timeout=self.timeout) as response:
            text = response.read(_LONGEST_REPLY + 1)
        if len(text) > _LONGEST_REPLY:
            raise ValueError(f"a reply of more than {_LONGEST_REPLY >> 20} MB")
        reply = json.loads(text)
        try:
            content = reply["choices"][0]["message"]["content"] or ""
            facts = reply | {"content": content, "fingerprint": reply.get("system_fingerprint")}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f"no choices in the reply: {str(reply)[:_LONGEST_ERROR]}") from None
        found = checked_reply(facts)
        return {
            key: self.redacted(value) if isinstance(value, str) else value for key, value in found.items()
        }


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
    path.parent.mkdir(parents=True, exist_ok=True)
    _finish_last_line(path)

    def is_readable(request: Request) -> bool:
        for attempt in range(attempts):
            if stop.is_set():
                return False
            try:
                told = {"id": request.id, "digest": request.digest, "requested": request.body["model"]}
                row = told | client.complete(request.body)
            except Exception:
                stop.set()  # no request is sent after a refusal, not even by this thread
                raise
            readable = request.task.parse(row["content"]) is not None
            if readable or attempt == attempts - 1:
                break
        with lock:
            with open(path, "a", encoding="utf-8", opener=no_links) as file:
                file.write(json_text(row) + "\n")
            if progress is not None:
                progress()
        return readable

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return sum(not readable for readable in pool.map(is_readable, requests))


def _finish_last_line(path: Path) -> None:
    """A run that was killed may have left half a line: start the next reply on a line of its own."""
    if path.is_file() and path.stat().st_size:
        with open(path, "rb+", opener=no_links) as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
