"""The answers of `/v1/chat/completions`: whole, or piece by piece as server-sent events."""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.responses import StreamingResponse

from mllm_jax.inference.generate import Generation
from mllm_jax.serve.engine import Job, Update
from mllm_jax.serve.errors import ApiError
from mllm_jax.serve.gate import Gone, Message, Receive, Send
from mllm_jax.serve.served import Served, ServedModel

_PULSE = 15  # seconds after which a stream without news says that it lives, so that proxies keep it open


async def follow(
    served: Served, model: ServedModel, job: Job, receive: Receive
) -> AsyncIterator[Update | None]:
    """Has a job done and yields its updates until it is; None every few seconds without one.

    Raises:
      Gone: the client has left; the job is dropped.
      ApiError: the job failed, or takes too long.
    """
    updates: asyncio.Queue[Update] = asyncio.Queue()
    left = asyncio.ensure_future(_left(receive))
    news: asyncio.Future[Update] | None = None
    started, complete, told = time.monotonic(), False, False
    deadline = started + served.settings.request_seconds
    served.submit(model, job, updates.put_nowait)
    try:
        while not complete:
            news = news or asyncio.ensure_future(updates.get())
            wait = min(_PULSE, deadline - time.monotonic())
            await asyncio.wait((news, left), timeout=max(0, wait), return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                raise Gone
            if not news.done():
                if time.monotonic() >= deadline:
                    seconds = served.settings.request_seconds
                    raise ApiError(504, f"the answer was not complete within {seconds:g} s", code="timeout")
                yield None
                continue
            update, news = news.result(), None
            if update.error is not None:
                complete = True
                raise _as_error(update.error)
            complete = update.answer is not None
            if complete:
                seconds = time.monotonic() - started
                served.took(seconds)
                served.metrics.seconds.labels(model.name).observe(seconds)
                served.metrics.prompt_tokens.labels(model.name).inc(len(job.request.prompt))
                served.metrics.answer_tokens.labels(model.name).inc(len(update.answer.tokens))
            elif not told:
                told = True
                served.metrics.first_seconds.labels(model.name).observe(time.monotonic() - started)
            yield update
    finally:
        left.cancel()
        if news is not None:
            news.cancel()
        if not complete:
            served.cancel(job)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _as_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error), param="messages")
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return ApiError(500, f"the model failed: {type(error).__name__}")


def usage(job: Job, answer: Generation) -> dict[str, int]:
    """Tokens of a prompt, visual tokens included, and of its answer."""
    prompt, made = len(job.request.prompt), len(answer.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def finish_reason(answer: Generation) -> str:
    """Whether it ended by itself."""
    return "stop" if answer.stopped else "length"


def head(model: ServedModel, kind: str) -> dict[str, Any]:
    """The fields with which every answer begins."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


async def whole_answer(served: Served, model: ServedModel, job: Job, receive: Receive) -> dict[str, Any]:
    """The answer as one object.

    Raises:
      Gone, ApiError: as `follow`.
    """
    answer: Generation | None = None
    async with contextlib.aclosing(follow(served, model, job, receive)) as updates:
        async for update in updates:
            answer = update.answer if update is not None else None
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(answer)}
    return head(model, "chat.completion") | {"choices": [choice], "usage": usage(job, answer)}


class StreamedAnswer(StreamingResponse):
    """A response that sends the answer as it grows.

    Args:
      with_usage: a last event tells the usage.
    """

    def __init__(self, served: Served, model: ServedModel, job: Job, with_usage: bool):
        # nginx would collect what is to be sent as it comes.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__((), media_type="text/event-stream", headers=headers)
        self._served, self._model, self._job, self._with_usage = served, model, job, with_usage
        self._head = head(model, "chat.completion.chunk")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Sends it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        # Of a client that does not read; another is told by `follow` that the time is over.
        seconds = self._served.settings.request_seconds + _PULSE
        try:
            async with asyncio.timeout(seconds):
                async with contextlib.aclosing(self._events(receive)) as events:
                    async for event in events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            raise Gone from None
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _events(self, receive: Receive) -> AsyncIterator[bytes]:
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            followed = follow(self._served, self._model, self._job, receive)
            async with contextlib.aclosing(followed) as updates:
                async for update in updates:
                    for event in self._events_of(update):
                        yield event
        except ApiError as error:
            yield _event(error.body)

    def _events_of(self, update: Update | None) -> Iterator[bytes]:
        if update is None:
            yield b": still at it\n\n"
            return
        if update.text:
            yield self._chunk({"content": update.text})
        if update.answer is not None:
            yield self._chunk({}, finish_reason(update.answer))
            if self._with_usage:
                yield _event(self._head | {"choices": [], "usage": usage(self._job, update.answer)})

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        extra = {"usage": None} if self._with_usage else {}
        return _event(self._head | {"choices": [choice]} | extra)


def _event(value: dict[str, Any]) -> bytes:
    # In ASCII: some clients end a line at any character that Unicode calls a line's end.
    return f"data: {json.dumps(value)}\n\n".encode()
