"""The request logger: appends requests to the request log in a thread of its own."""

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
    """A log of requests and predictions, such as `RequestLog`."""

    def append(self, requests: Sequence[LoggedRequest]) -> int:
        """Append requests in one commit, and return how many were appended."""


class RequestLogger:
    """Appends requests to a log in a thread, several per commit, so that no response waits for the disk.

    Args:
        sink: The log; None logs nothing.
    """

    def __init__(self, sink: RequestSink | None) -> None:
        self.sink, self.num_dropped = sink, 0
        self._queue: queue.Queue[LoggedRequest | threading.Event | None] = queue.Queue(_MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def log(self, requests: Sequence[LoggedRequest]) -> None:
        """Log requests soon; they are dropped and counted if the disk is too slow."""
        if self.sink is None:
            return
        for each in requests:
            try:
                self._queue.put_nowait(each)
            except queue.Full:
                self.num_dropped += 1

    def flush(self) -> None:
        """Wait until all requests logged so far are on the disk."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()

    def close(self) -> None:
        """Log the waiting requests, then stop the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            self._write([each for each in batch if isinstance(each, LoggedRequest)])
            for each in batch:
                if isinstance(each, threading.Event):
                    each.set()
            if None in batch:
                return

    def _write(self, requests: list[LoggedRequest]) -> None:
        if not requests or self.sink is None:
            return
        try:
            self.sink.append(requests)
        except Exception:
            self.num_dropped += len(requests)
            LOG.exception("%d request(s) were not logged", len(requests))


def allows_logging(request: Request) -> bool:
    """Return False if the client forbids it: `Cache-Control: no-store` (RFC 9111, 5.2.1.5)."""
    directives = ",".join(request.headers.getlist("cache-control")).lower().split(",")
    return "no-store" not in (each.strip() for each in directives)


def make_ids(request_id: str, count: int, *, is_list: bool) -> list[str]:
    """Return the id of each input of a request: that of the request, with the index of the input if it is a list."""
    return [f"{request_id}-{index}" for index in range(count)] if is_list else [request_id]


def build_logged_requests(
    model: ServedModel,
    ids: Sequence[str],
    sent: Sequence[tuple[bytes, str]],
    stored: TensorTree,
    predictions: Sequence[dict[str, Any]],
) -> list[LoggedRequest]:
    """Return the entries of the request log for a request.

    Args:
        model: The version of the model.
        ids: The id of each input.
        sent: Body and content type of each input.
        stored: The stored inputs (b, ...).
        predictions: The prediction of each input.
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
    """Hash a stored input, so that one image sent in two encodings has one digest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(stored).items()):
        digest.update(name.encode() + b"\0" + tensor[row].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
