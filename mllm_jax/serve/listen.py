"""Listening: uvicorn with bounds on how long a client may take to say what it wants."""

import asyncio
import signal
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # from a request's first byte (or a new connection) to the end of its headers
HEADER_BYTES = 32 << 10


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request headers do not come to an end; uvicorn would wait for ever."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._bound()

    def data_received(self, data: bytes) -> None:
        """A client has sent something."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._bound()
        elif self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def _bound(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self._close)

    def _close(self) -> None:
        self._waiting = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


def make_server(
    app: FastAPI, *, connections: int, drain_seconds: int, access_log: bool = False
) -> uvicorn.Server:
    """A server that has not begun to listen.

    Args:
      app: from `app.create_app`.
      connections: open at once, at most; more are answered with 503.
      drain_seconds: that requests get to finish.
      access_log: print a line for every request.
    """
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=drain_seconds,
    )
    return uvicorn.Server(config)


def listen(server: uvicorn.Server, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT; then accepts nothing new and finishes what has begun.

    Raises:
      OSError: the address cannot be used.
    """
    # uvicorn raises the signal again when it has drained, which would make the exit code that of a crash.
    signal.signal(signal.SIGTERM, lambda *_: None)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(server.config.backlog)  # who reads the address can connect at once
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{bound.getsockname()[1]}"
        print(f"listening on {address}/v1\nchat page at {address}/", flush=True)
        server.run(sockets=[bound])
