"""Connections and signals: bounds on what a connection may do, and a stop that answers what was accepted."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from tuneforge.errors import TryAgainError, UsageError
from tuneforge_serve.server.request_body import Limits

LOG = logging.getLogger("tuneforge.serve")
_BACKLOG = 1024
_MAX_EXCESS_CONNECTIONS = 64  # connections above the bound that are told so; further ones are cut


class BoundedConnection(H11Protocol):
    """A connection of uvicorn's that is bounded in number and in time, and that answers a client who closed one side.

    uvicorn waits for ever for the head of a request, and drops a request whose sender has no more to say.
    """

    limits = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, and begin to wait for a request."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        surplus = len(self.connections) - self.limits.max_connections
        if surplus > _MAX_EXCESS_CONNECTIONS:
            transport.abort()
        elif surplus > 0:
            self.app = _reject_connection
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget its timer."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; a head that has begun must end in time, and so must a body that nobody reads any more."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """See what else the client is sending."""
        super().on_response_complete()
        self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more: answer the request that is whole, refuse the one that broke off."""
        if self._answering():
            if not self.cycle.more_body:
                self.cycle.keep_alive = False
                return True
            self._refuse(400, "the body broke off")
        elif self.conn.trailing_data[0]:
            self._refuse(400, "the head of the request broke off")
        return False

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or a head that is too large."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status, "the head of the request is too large" if status == 431 else "this is no HTTP request")

    @property
    def _begun(self) -> bool:
        """True once a request has arrived."""
        cycle: RequestResponseCycle | None = self.cycle  # uvicorn declares it without the None that it starts with
        return cycle is not None

    def _answering(self) -> bool:
        return self._begun and not self.cycle.response_complete

    def _watch(self) -> None:
        """Be impatient while bytes are due: nothing has come yet, a head is not whole, or an answered body goes on."""
        unread = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        due = not self._answering() and not self.transport.is_closing() and (unread or not self._begun)
        if not due:
            self._unwatch()
        elif self._late is None:
            self._late = self.loop.call_later(self.limits.header_timeout_s, self._too_late)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the head of the request did not arrive within {self.limits.header_timeout_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer without a request, and close."""
        body = json.dumps({"error": message}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        try:
            for event in (
                h11.Response(status_code=status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:
            pass  # an answer has begun; only the end of the connection can say that something is wrong
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, with signals that drain: the first stops accepting and answers what was accepted, the second leaves."""

    def __init__(
        self, config: uvicorn.Config, *, on_started: Callable[[], None], on_stopping: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_started, self._on_stopping = on_started, on_stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets=sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while the server runs; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        taken = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in taken.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop gently; at the second time at once."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        self._on_stopping()
        LOG.info("stopping: %d connection(s); a second signal leaves at once", len(self.server_state.connections))


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        TryAgainError: The port is taken.
        UsageError: There is no such address here.
    """
    found = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, number)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        if found is not None:
            found.close()
        if error.errno == errno.EADDRINUSE:
            raise TryAgainError(f"port {port} is taken", where="--port", fix="name another, or 0 for any") from None
        raise UsageError(f"cannot listen at '{host}', port {port}", where="--host", why=str(error)) from None
    return found


def create_server(app: Starlette, limits: Limits, *, on_started: Callable[[], None] = lambda: None) -> Server:
    """What serves an application: `run(sockets=[...])` returns once a signal came and everything accepted is answered.

    Args:
        app: As `create_app` gives it.
        limits: Bounds on connections.
        on_started: Is called once connections are accepted.
    """
    protocol = type("Bounded", (BoundedConnection,), {"limits": limits})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_keep_alive=10,
    )

    def on_stopping() -> None:
        app.state.service.stopping = True

    return Server(config, on_started=on_started, on_stopping=on_stopping)


async def _reject_connection(scope: Scope, receive: Receive, send: Send) -> None:
    """Tell a connection above the bound to come back."""
    body = b'{"error": "too many connections; try again in a second"}'
    names = {b"content-type": b"application/json", b"retry-after": b"1", b"connection": b"close"}
    headers = [*names.items(), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
