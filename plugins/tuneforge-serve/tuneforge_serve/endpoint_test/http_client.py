"""An HTTP client for a server under test: it waits while the server is busy, and explains failures."""

from __future__ import annotations

import ssl
import time
from threading import Lock
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from tuneforge.errors import DataError, TryAgainError, UsageError

_MAX_RETRY_S = 30.0


class ServerClient:
    """A client for one server; threads may share it. Use it as a context manager, or call `close`.

    Args:
        url: The address of the server, such as `http://127.0.0.1:8000`.
        token: Sent as a bearer token.
        timeout_s: The longest time to wait for a response, in seconds.

    Raises:
        UsageError: `url` is not an address of a server.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 30.0) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            is_address = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise UsageError(f"'{url}' is not an address of a server", where="URL", fix="pass http://HOST:PORT")
        self.url = url
        self.num_retries = 0
        self._lock = Lock()
        self._http = httpx.Client(
            base_url=parts.geturl().rstrip("/"),
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy of the environment would be measured instead of the server
            verify=ssl.create_default_context() if parts.scheme == "https" else False,
        )

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[Any, float]:
        """Send a request, and return the JSON of the response and the latency in seconds.

        While the server is busy (503), the request is repeated after the time that the server names.

        Raises:
            TryAgainError: The server cannot be reached, does not respond, or stays busy.
            DataError: The server refuses the request; the message contains its reason.
        """
        deadline = time.monotonic() + _MAX_RETRY_S
        while True:
            start = time.perf_counter()
            response = self._send(method, path, body, headers)
            latency_s = time.perf_counter() - start
            wait_s = _retry_after(response)
            if response.status_code != 503 or time.monotonic() + wait_s > deadline:
                break
            with self._lock:
                self.num_retries += 1
            time.sleep(wait_s)
        if response.status_code == 503:
            raise TryAgainError(f"the server at {self.url} stays busy", why=_reason(response), fix="try again later")
        if response.status_code >= 400:
            what = f"the server responds {response.status_code} to {method} {path}"
            raise DataError(what, where=self.url, why=_reason(response))
        try:
            return (response.json() if response.content.strip() else None), latency_s
        except ValueError:
            raise DataError(f"the response to {method} {path} is not JSON", where=self.url) from None

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str] | None) -> httpx.Response:
        try:
            return self._http.request(method, path, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise TryAgainError(
                f"cannot reach the server at {self.url}",
                why=str(error) or type(error).__name__,
                fix="start it (tuneforge serve), or check the address",
            ) from None


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(_MAX_RETRY_S, float(response.headers.get("Retry-After", "1")))
    except ValueError:  # an HTTP date
        return 1.0


def _reason(response: httpx.Response) -> str:
    """Return the server's error message, at most 300 characters of it."""
    try:
        content = response.json()
        text = content.get("error", content) if isinstance(content, dict) else content
    except ValueError:
        text = response.text
    return str(text)[:300]
