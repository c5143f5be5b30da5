"""The socket, the uvicorn server with its limits, and a shutdown that finishes every accepted request."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette

from tuneforge.errors import TryAgainError, UsageError
from tuneforge_serve.server.limits import Limits

LOG = logging.getLogger("tuneforge.serve")
_BACKLOG = 1024


class Server(uvicorn.Server):
    """A uvicorn server: the first signal stops it after every accepted request, the second one at once.

    uvicorn itself raises the signal again after it has stopped, so that the process would end with an error.
    """

    def __init__(
        self, config: uvicorn.Config, *, on_started: Callable[[], None], on_stopping: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_started, self._on_stopping = on_started, on_stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections, and call `on_started`."""
        await super().startup(sockets=sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM while the server runs; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Stop after the accepted requests; on the second signal exit at once."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        self._on_stopping()
        num_connections = len(self.server_state.connections)
        LOG.info("stopping: %d connection(s) open; a second signal exits at once", num_connections)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        TryAgainError: The port is in use.
        UsageError: This machine has no such address.
    """
    listener = None
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            fix = "choose another port, or 0 for any free one"
            raise TryAgainError(f"port {port} is in use", where="--port", fix=fix) from None
        raise UsageError(f"cannot listen on '{host}', port {port}", where="--host", why=str(error)) from None
    return listener


def create_server(app: Starlette, limits: Limits, *, on_started: Callable[[], None] = lambda: None) -> Server:
    """Create the server of an application: `run(sockets=[...])` returns after a signal and every accepted request.

    Args:
        app: The application, as `create_app` returns it.
        limits: Limits on connections.
        on_started: Called once connections are accepted.
    """
    config = uvicorn.Config(
        app,
        http="h11",  # the only protocol of uvicorn that limits the size of headers
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        limit_concurrency=limits.max_connections + 1,  # uvicorn refuses at the limit, not above it
        timeout_keep_alive=limits.keep_alive_s,
    )

    def on_stopping() -> None:
        app.state.service.stopping = True

    return Server(config, on_started=on_started, on_stopping=on_stopping)
