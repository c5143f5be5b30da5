"""What is kept of requests and their answers, and who puts it into the records."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from starlette.requests import Request

from tuneforge.engine.data.dataset import Inputable, tensors_of
from tuneforge.ship.circle.exchanges import Exchange
from tuneforge.ship.circle.watch import features_of
from tuneforge.ship.serve.models import Served

LOG = logging.getLogger("tuneforge.serve")
_KEPT_WAITING = 1024


class Keeps(Protocol):
    """What a server puts requests and answers into, such as `tuneforge.ship.circle.records.Records`."""

    def keep(self, exchanges: Sequence[Exchange]) -> int:
        """Keep them in one commit; how many were kept."""


class Keeper:
    """Puts requests into the records from a thread, many in one commit, so that no answer waits for the disk.

    Args:
        records: Where they go; None keeps nothing.
    """

    def __init__(self, records: Keeps | None) -> None:
        self.records, self.dropped = records, 0
        self._waiting: queue.Queue[Exchange | threading.Event | None] = queue.Queue(_KEPT_WAITING)
        self._thread = threading.Thread(target=self._work, name="keeper", daemon=True)
        self._thread.start()

    def keep(self, exchanges: Sequence[Exchange]) -> None:
        """Keep inputs with their answers soon; they are dropped and counted where the disk cannot follow."""
        if self.records is None:
            return
        for each in exchanges:
            try:
                self._waiting.put_nowait(each)
            except queue.Full:
                self.dropped += 1

    def flush(self) -> None:
        """Wait until everything given so far is on the disk."""
        done = threading.Event()
        self._waiting.put(done)
        done.wait()

    def close(self) -> None:
        """Keep what waits, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            taken = [self._waiting.get()]
            while not self._waiting.empty():
                taken.append(self._waiting.get())
            self._write([each for each in taken if isinstance(each, Exchange)])
            for each in taken:
                if isinstance(each, threading.Event):
                    each.set()
            if None in taken:
                return

    def _write(self, exchanges: list[Exchange]) -> None:
        if not exchanges or self.records is None:
            return
        try:
            self.records.keep(exchanges)
        except Exception:
            self.dropped += len(exchanges)
            LOG.exception("%d request(s) were not kept", len(exchanges))


def may_be_kept(request: Request) -> bool:
    """False where the client asks that nothing of it is stored: `Cache-Control: no-store` (RFC 9111, 5.2.1.5)."""
    asked = ",".join(request.headers.getlist("cache-control")).lower().split(",")
    return "no-store" not in (each.strip() for each in asked)


def ids_of(identity: str, count: int, *, several: bool) -> list[str]:
    """The number of each input of a request: the request's own, or where it has several, that and its place."""
    return [f"{identity}-{place}" for place in range(count)] if several else [identity]


def exchanges(
    served: Served,
    ids: Sequence[str],
    sent: Sequence[tuple[bytes, str]],
    stored: Inputable,
    answers: Sequence[dict[str, Any]],
) -> list[Exchange]:
    """What is kept of a request.

    Args:
        served: What answered.
        ids: Of each input.
        sent: Body and content type of each.
        stored: What the model saw (b, ...).
        answers: Of each.
    """
    return [
        Exchange(
            id=own,
            version=served.version,
            body=body,
            content_type=content_type,
            answer=answer,
            features=features,
            content=_digest(stored, place),
        )
        for place, (own, (body, content_type), features, answer) in enumerate(
            zip(ids, sent, features_of(stored), answers, strict=True)
        )
    ]


def _digest(stored: Inputable, row: int) -> str:
    """Of what the model saw, so that one picture sent in two ways is one content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors_of(stored).items()):
        digest.update(name.encode() + b"\0" + tensor[row].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
