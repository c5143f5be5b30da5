"""A server in a thread, a plain client, and an empty file of records."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from shared_fixtures import own_cache, plant, shared_cache, tune
from tuneforge_serve.feedback.request_log import RequestLog
from tuneforge_serve.server.service import Limits


@attrs.frozen
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@attrs.frozen(eq=False)
class Served:
    host: str
    port: int
    app: Any
    server: Any

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def service(self) -> Any:
        return self.app.state.service

    def connect(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return ask(self.host, self.port, method, path, body, **headers)


def ask(host: str, port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """One request on a connection of its own; anything but bytes goes as JSON."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body, given = json.dumps(body).encode(), {"Content-Type": "application/json", **given}
    with closing(http.client.HTTPConnection(host, port, timeout=20)) as connection:
        connection.request(method, path, body, given)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


@contextmanager
def served(path: Path, *, limits: Limits | None = None, **given: Any) -> Iterator[Served]:
    from tuneforge_serve.server.app import create_app
    from tuneforge_serve.server.http_server import create_server, open_socket
    from tuneforge_serve.server.model_manager import find_model_sources

    limits = limits or Limits()
    app = create_app(find_model_sources(path), limits=limits, discover=lambda: find_model_sources(path), **given)
    listener, up = open_socket("127.0.0.1", 0), threading.Event()
    port = listener.getsockname()[1]
    server = create_server(app, limits, on_started=up.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    assert up.wait(30)
    try:
        yield Served("127.0.0.1", port, app, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def serving():
    return served


@pytest.fixture
def records(tmp_path: Path) -> Iterator[RequestLog]:
    with RequestLog(tmp_path / "requests.db") as opened:
        yield opened


__all__ = ["own_cache", "plant", "shared_cache", "tune"]
