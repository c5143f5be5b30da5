"""Request bodies: limits on size and time, and errors that become responses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import attrs
from starlette.requests import ClientDisconnect, Request

from tuneforge.errors import TuneforgeError
from tuneforge_serve.server.limits import Limits


class RequestError(Exception):
    """An error that becomes the response to a request.

    Args:
        status: The HTTP status.
        message: Names the wrong field, and never a path of this machine.
        headers: Further headers of the response.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def busy_error(reason: str) -> RequestError:
    """Return the error of a busy server."""
    return RequestError(503, f"{reason}; try again in a second", {"Retry-After": "1"})


def format_error(error: TuneforgeError, *, field: str = "") -> str:
    """Return an error about a client's input as one line; such errors name columns, never paths."""
    where = ", ".join(each for each in (field, error.where) if each)
    return "; ".join(each for each in (f"{where}: {error.what}" if where else error.what, error.why, error.fix) if each)


class BodyReader:
    """Reads bodies, and limits their total size.

    Args:
        limits: Limits of the server.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self._reserved_bytes = limits, 0

    @contextmanager
    def reserve(self) -> Iterator[BodyReservation]:
        """Reserve memory for one body until the end of the block."""
        reservation = BodyReservation(self)
        try:
            yield reservation
        finally:
            self._reserved_bytes -= reservation.num_bytes

    def add_bytes(self, num_bytes: int) -> None:
        """Count received bytes.

        Raises:
            RequestError: All bodies together are too large.
        """
        if self._reserved_bytes + num_bytes > self._limits.max_total_body_bytes:
            raise busy_error("the server holds too many bodies")
        self._reserved_bytes += num_bytes

    async def read(self, request: Request, reservation: BodyReservation) -> bytes:
        """Read the body of a request.

        Raises:
            RequestError: The body is too large, too slow, or incomplete.
        """
        max_bytes = self._limits.max_body_bytes
        too_large = RequestError(413, f"the body is larger than {max_bytes:,} bytes")
        if int(request.headers.get("content-length", "0")) > max_bytes:  # h11 has checked the number
            raise too_large
        if "content-encoding" in request.headers:
            raise RequestError(415, "Content-Encoding: compressed bodies are not supported")
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                async for part in request.stream():
                    reservation.add(len(part))
                    parts.append(part)
                    if reservation.num_bytes > max_bytes:
                        raise too_large
        except TimeoutError:
            message = f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            raise RequestError(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise RequestError(400, "the body is incomplete") from None
        return b"".join(parts)


@attrs.define(eq=False)
class BodyReservation:
    """The memory of one body."""

    _reader: BodyReader
    num_bytes: int = 0

    def add(self, count: int) -> None:
        """Count received bytes."""
        self._reader.add_bytes(count)
        self.num_bytes += count
