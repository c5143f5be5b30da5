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

from tuneforge import TensorTree
from tuneforge.exporting import named_tensors
from tuneforge_serve.feedback.monitoring import compute_features
from tuneforge_serve.feedback.schemas import LoggedRequest
from tuneforge_serve.server.model_manager import ServedModel

LOG = logging.getLogger("tuneforge.serve")
_MAX_QUEUED = 1024


class RequestSink(Protocol):
    """What a server puts requests and answers into, such as `tuneforge_serve.feedback.request_log.RequestLog`."""

    def append(self, requests: Sequence[LoggedRequest]) -> int:
        """Keep them in one commit; how many were kept."""


class RequestLogger:
    """Puts requests into the records from a thread, many in one commit, so that no answer waits for the disk.

    Args:
        sink: Where they go; None keeps nothing.
    """

    def __init__(self, sink: RequestSink | None) -> None:
        self.sink, self.num_dropped = sink, 0
        self._queue: queue.Queue[LoggedRequest | threading.Event | None] = queue.Queue(_MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def log(self, requests: Sequence[LoggedRequest]) -> None:
        """Keep inputs with their answers soon; they are dropped and counted where the disk cannot follow."""
        if self.sink is None:
            return
        for each in requests:
            try:
                self._queue.put_nowait(each)
            except queue.Full:
                self.num_dropped += 1

    def flush(self) -> None:
        """Wait until everything given so far is on the disk."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()

    def close(self) -> None:
        """Keep what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            taken = [self._queue.get()]
            while not self._queue.empty():
                taken.append(self._queue.get())
            self._write([each for each in taken if isinstance(each, LoggedRequest)])
            for each in taken:
                if isinstance(each, threading.Event):
                    each.set()
            if None in taken:
                return

    def _write(self, requests: list[LoggedRequest]) -> None:
        if not requests or self.sink is None:
            return
        try:
            self.sink.append(requests)
        except Exception:
            self.num_dropped += len(requests)
            LOG.exception("%d request(s) were not kept", len(requests))


def allows_logging(request: Request) -> bool:
    """False where the client asks that nothing of it is stored: `Cache-Control: no-store` (RFC 9111, 5.2.1.5)."""
    asked = ",".join(request.headers.getlist("cache-control")).lower().split(",")
    return "no-store" not in (each.strip() for each in asked)


def make_ids(request_id: str, count: int, *, several: bool) -> list[str]:
    """The number of each input of a request: the request's own, or where it has several, that and its place."""
    return [f"{request_id}-{index}" for index in range(count)] if several else [request_id]


def build_logged_requests(
    model: ServedModel,
    ids: Sequence[str],
    sent: Sequence[tuple[bytes, str]],
    stored: TensorTree,
    predictions: Sequence[dict[str, Any]],
) -> list[LoggedRequest]:
    """What is kept of a request.

    Args:
        model: What answered.
        ids: Of each input.
        sent: Body and content type of each.
        stored: What the model saw (b, ...).
        predictions: Of each.
    """
    return [
        LoggedRequest(
            id=row_id,
            version=model.version,
            body=body,
            content_type=content_type,
            prediction=prediction,
            features=features,
            content_digest=_hash_row(stored, row),
        )
        for row, (row_id, (body, content_type), features, prediction) in enumerate(
            zip(ids, sent, compute_features(stored), predictions, strict=True)
        )
    ]


def _hash_row(stored: TensorTree, row: int) -> str:
    """Of what the model saw, so that one picture sent in two ways is one content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(stored).items()):
        digest.update(name.encode() + b"\0" + tensor[row].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
