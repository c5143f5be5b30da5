"""Connections to a server that speaks JSON over HTTP: kept open, patient with a busy one, in plain words on failure."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from tuneforge.errors import DataError, TryAgainError, UsageError

_MAX_RETRY_S = 30.0


class ServerClient:
    """A server under test.

    Args:
        url: Such as `http://127.0.0.1:8000`.
        token: Sent as a bearer token.
        timeout_s: Longest wait for an answer.

    Raises:
        UsageError: The URL is none.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            known = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise UsageError(f"'{url}' is no address of a server", where="URL", fix="give http://HOST:PORT")
        self.url, self.timeout_s = url, timeout_s
        self._host, self._port, self.path = parts.hostname or "", parts.port, parts.path.rstrip("/")
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._lock = Lock()
        self.num_retries = 0

    def connect(self) -> ClientConnection:
        """A connection that is kept open; each thread has its own."""
        return ClientConnection(self, self._kind(self._host, self._port, timeout=self.timeout_s))

    def count_retry(self) -> None:
        """One request was sent again."""
        with self._lock:
            self.num_retries += 1


class ClientConnection:
    """One kept connection to a server. Made by `ServerClient.connect`."""

    def __init__(self, server: ServerClient, http: HTTPConnection) -> None:
        self._server, self._http = server, http

    def close(self) -> None:
        """Close it."""
        self._http.close()

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[Any, float]:
        """The JSON that the server answers, and how long the answer took in seconds.

        A busy server (503) is asked again after the time that it names.

        Raises:
            TryAgainError: It cannot be reached, does not answer, or stays busy.
            DataError: It refuses the request; the message holds its reason.
        """
        deadline = time.monotonic() + _MAX_RETRY_S
        while True:
            began = time.perf_counter()
            status, content, wait_s = self._exchange(method, path, body, headers)
            took = time.perf_counter() - began
            if status != 503 or time.monotonic() + wait_s > deadline:
                break
            self._server.count_retry()
            time.sleep(wait_s)
        if status == 503:
            raise TryAgainError(f"the server at {self._server.url} stays busy", why=_reason(content), fix="try later")
        if status >= 400:
            raise DataError(
                f"the server answers {status} to {method} {path}", where=self._server.url, why=_reason(content)
            )
        try:
            return (json.loads(content) if content.strip() else None), took
        except ValueError:
            raise DataError(f"the answer to {method} {path} is no JSON", where=self._server.url) from None

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes, float]:
        named = {name.replace("_", "-"): value for name, value in headers.items()} | self._server.headers
        try:
            self._http.request(method, self._server.path + path, body, named)
            response = self._http.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            self._http.close()
            raise TryAgainError(
                f"cannot reach the server at {self._server.url}",
                why=str(error) or type(error).__name__,
                fix="start it (tuneforge serve), or check the address",
            ) from None
        try:
            wait_s = min(_MAX_RETRY_S, float(response.getheader("Retry-After", "1")))
        except ValueError:
            wait_s = 1.0
        return response.status, content, wait_s


def _reason(content: bytes) -> str:
    """The server's own words for an error, shortened."""
    try:
        said = json.loads(content)
        text = said.get("error", said) if isinstance(said, dict) else said
    except ValueError:
        text = content.decode(errors="replace")
    return str(text)[:300]
