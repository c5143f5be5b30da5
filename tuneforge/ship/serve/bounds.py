"""What a request may cost, checked before the work: size, time, and how much waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import attrs
from starlette.requests import ClientDisconnect, Request

from tuneforge.errors import TuneforgeError
from tuneforge.ship.serve.limits import Limits as Limits


class Refusal(Exception):  # noqa: N818 - it is an answer, not a fault
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: Names the field that is wrong, and no path.
        headers: Further ones of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def busy(what: str) -> Refusal:
    """The answer of a server that has too much to do."""
    return Refusal(503, f"{what}; try again in a second", {"Retry-After": "1"})


def in_words(error: TuneforgeError, *, field: str = "") -> str:
    """An error about what a client sent, as one line; errors of the contracts name columns, never paths."""
    where = ", ".join(each for each in (field, error.where) if each)
    return "; ".join(each for each in (f"{where}: {error.what}" if where else error.what, error.why, error.fix) if each)


class Bodies:
    """Reads bodies, and counts what all of them hold.

    Args:
        limits: Of the server.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits, self._held = limits, 0

    @contextmanager
    def held(self) -> Iterator[Holding]:
        """Room for one body; given back at the end, however that comes."""
        holding = Holding(self)
        try:
            yield holding
        finally:
            self._held -= holding.count

    def take(self, count: int) -> None:
        """Count bytes that arrived.

        Raises:
            Refusal: All bodies together are too large.
        """
        if self._held + count > self._limits.held_bytes:
            raise busy("the server holds as much as it may")
        self._held += count

    async def read(self, request: Request, holding: Holding) -> bytes:
        """The body of a request.

        Raises:
            Refusal: It is too large, too slow, or breaks off.
        """
        most = self._limits.body_bytes
        too_large = Refusal(413, f"the body is larger than {most:,} bytes")
        if int(request.headers.get("content-length", "0")) > most:  # the HTTP parser has seen that it is a number
            raise too_large
        if "content-encoding" in request.headers:
            raise Refusal(415, "Content-Encoding: compressed bodies are not read; send the body as it is")
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for part in request.stream():
                    holding.add(len(part))
                    parts.append(part)
                    if holding.count > most:
                        raise too_large
        except TimeoutError:
            message = f"the body did not arrive within {self._limits.body_s:g} s"
            raise Refusal(408, message, {"Connection": "close"}) from None
        except ClientDisconnect:
            raise Refusal(400, "the body broke off") from None
        return b"".join(parts)


@attrs.define(eq=False)
class Holding:
    """Bytes that one request holds."""

    _bodies: Bodies
    count: int = 0

    def add(self, count: int) -> None:
        """Count more of them."""
        self._bodies.take(count)
        self.count += count
