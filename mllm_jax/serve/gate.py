"""What every request passes before it is looked at: host, key, room, size and time. Plain ASGI."""

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from mllm_jax.serve.errors import ApiError
from mllm_jax.serve.served import Served

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/favicon.ico")  # without a key: the page asks for it, and load balancers have none
OPEN_BELOW = "/page/"


class Gone(Exception):
    """The client has left."""


class Gate:
    """Refuses requests before they cost anything, and hands their bodies on whole.

    Args:
      app: what answers those that pass.
      served: whose settings are obeyed.
      paths: those that are counted by name.
    """

    def __init__(self, app: App, served: Served, paths: frozenset[str]):
        self._app, self._served, self._paths = app, served, paths

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"
        counted = self._served.metrics.requests

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                counted.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            await self._answer(scope, receive, send_counted)
        except Gone:
            self._served.metrics.gone.inc()
        except Exception:  # answered with 500 outside of here
            counted.labels(path, "500").inc()
            raise

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers, entered, unread = Headers(scope=scope), False, scope["method"] == "POST"
        try:
            self._check_sender(scope["path"], headers)
            if unread:
                self._check_room(headers)
                self._served.entered += 1
                entered, unread = True, False
                receive = _replay(await self._body(headers, receive), receive)
            await self._app(scope, receive, send)
        except ApiError as error:
            if unread:  # a client that still writes would not see the answer
                with contextlib.suppress(ApiError):
                    await self._body(headers, receive, keep=False)
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
        finally:
            self._served.entered -= entered

    def _check_sender(self, path: str, headers: Headers) -> None:
        settings = self._served.settings
        if settings.hosts and _name(headers.get("host", "")) not in settings.hosts:
            raise ApiError(403, "this server is not addressed by that name (see --allow-host)")
        if settings.api_key is None or path in OPEN or path.startswith(OPEN_BELOW):
            return
        given = headers.get("authorization", "")
        wanted = f"Bearer {settings.api_key}"
        if not hmac.compare_digest(given.encode("latin-1"), wanted.encode()):  # the bytes that were sent
            raise ApiError(
                401,
                "the request carries no valid key; send `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_room(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another site may not send unasked
            raise ApiError(415, "the body must be JSON, with `Content-Type: application/json`")
        self._served.check_room()

    async def _body(self, headers: Headers, receive: Receive, keep: bool = True) -> bytes:
        settings = self._served.settings
        most = settings.most_body_bytes
        closing = {"Connection": "close"}  # or what is still being sent would be read on
        message = f"the request has more than {most:,} bytes; send smaller or fewer images"
        too_large = ApiError(413, message, headers=closing)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        pieces, size = [], 0
        try:
            async with asyncio.timeout(settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    size += len(message.get("body", b""))
                    if size > most:
                        raise too_large
                    if keep:
                        pieces.append(message.get("body", b""))
                    if not message.get("more_body"):
                        return b"".join(pieces)
        except TimeoutError:
            message = f"the request did not arrive within {settings.body_seconds:g} s"
            raise ApiError(408, message, headers=closing) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, then whatever comes."""
    left = [body]

    async def replayed() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return replayed


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    end = host.rfind("]") + 1 if host.startswith("[") else host.find(":")
    return (host[:end] if end > 0 else host).strip("[]").lower()
