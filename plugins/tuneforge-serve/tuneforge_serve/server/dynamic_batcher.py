"""Requests that wait together become one forward pass.

A thread takes what waits whenever it is free. It waits for more only while requests are known to be on their way (they
arrived and are being decoded), so a lone request never waits for company; and never longer than `max_wait_s` from the
moment that the oldest of the batch arrived.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import TensorTree, map_inputs, named_tensors
from tuneforge.exporting import concatenate_inputs
from tuneforge_serve.server.request_body import busy_error

T = TypeVar("T")


class SupportsOutputs(Protocol):
    """What a batch is computed by: one version of one model."""

    def outputs(self, stored: TensorTree) -> Tensor:
        """Outputs (b, k) of stored inputs (b, ...)."""


@attrs.frozen(eq=False)
class InferenceResult:
    """What a request gets back.

    Args:
        outputs: (b, k), float32.
        queue_s: From arrival to the start of the forward pass.
        forward_s: The forward pass.
        batch_size: Of the whole batch that it was part of.
    """

    outputs: Tensor
    queue_s: float
    forward_s: float
    batch_size: int


@attrs.frozen(eq=False)
class _QueuedRequest:
    model: SupportsOutputs
    stored: TensorTree
    signature: tuple[Any, ...]
    num_rows: int
    future: Future[InferenceResult] = attrs.field(factory=Future)
    arrival_time: float = attrs.field(factory=time.perf_counter)

    def can_batch_with(self, other: _QueuedRequest) -> bool:
        """True where both can be rows of one batch."""
        return self.model is other.model and self.signature == other.signature


Submit = Callable[[SupportsOutputs, TensorTree], "Future[InferenceResult]"]
"""Puts stored inputs (b, ...) into the queue, to be computed by one version."""


class DynamicBatcher:
    """The queue, and the thread that empties it.

    Args:
        max_batch_size: Most rows of one forward pass.
        max_queue_size: Most rows that wait.
        max_wait_s: Longest wait of a request for others that are on their way.
        on_batch: Is called with the results of each batch, one a request.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_queue_size: int,
        max_wait_s: float,
        on_batch: Callable[[Sequence[InferenceResult]], None] = lambda results: None,
    ) -> None:
        self._max_batch_size, self._max_queue_size, self._max_wait_s, self._on_batch = (
            max_batch_size,
            max_queue_size,
            max_wait_s,
            on_batch,
        )
        self._queue: deque[_QueuedRequest] = deque()
        self._tasks: deque[Callable[[], None]] = deque()
        self._num_queued_rows = 0
        self._num_expected = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)
        self._thread.start()

    @property
    def num_queued_rows(self) -> int:
        """Rows that wait."""
        return self._num_queued_rows

    def check_capacity(self) -> None:
        """See that more may wait.

        Raises:
            RequestError: Too much waits already.
        """
        with self._changed:
            self._require_capacity(1)

    @contextmanager
    def expect_request(self) -> Iterator[Submit]:
        """While a request is on its way to the queue: others may wait for it. Gives what puts it there."""
        with self._changed:
            self._num_expected += 1
        arrived = False

        def submit(model: SupportsOutputs, stored: TensorTree) -> Future[InferenceResult]:
            nonlocal arrived
            future = self._enqueue(model, stored, num_expected=1)
            arrived = True
            return future

        try:
            yield submit
        finally:
            if not arrived:
                with self._changed:
                    self._num_expected -= 1
                    self._changed.notify()

    def submit(self, model: SupportsOutputs, stored: TensorTree) -> Future[InferenceResult]:
        """Put rows into the queue. A cancelled future is not computed.

        Raises:
            RequestError: Too much waits already.
        """
        return self._enqueue(model, stored, num_expected=0)

    def run_task(self, work: Callable[[], T]) -> Future[T]:
        """Do something else in this thread, before what waits; a model is warmed where it will compute.

        Raises:
            RequestError: It is closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise busy_error("the server is stopping")
            self._tasks.append(partial(_run_task, work, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Compute what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, model: SupportsOutputs, stored: TensorTree, *, num_expected: int) -> Future[InferenceResult]:
        """Put rows into the queue; so many cease to be coming in the same moment, so that a lone one waits for none."""
        named = named_tensors(stored)
        signature = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in named.items())
        queued = _QueuedRequest(model, stored, signature, num_rows=len(next(iter(named.values()))))
        with self._changed:
            self._require_capacity(queued.num_rows)
            self._num_expected -= num_expected
            self._queue.append(queued)
            self._num_queued_rows += queued.num_rows
            self._changed.notify()
        return queued.future

    def _require_capacity(self, rows: int) -> None:
        """See that so many more may wait; alone, a request of any size may."""
        if not self._queue or self._num_queued_rows + rows <= self._max_queue_size:
            return
        self._queue = deque(each for each in self._queue if not each.future.cancelled())
        self._num_queued_rows = sum(each.num_rows for each in self._queue)
        if self._queue and self._num_queued_rows + rows > self._max_queue_size:
            raise busy_error(f"{self._num_queued_rows} rows wait already")

    def _run(self) -> None:
        while work := self._next_task():
            work()

    def _next_task(self) -> Callable[[], None] | None:
        """What to do next; None at the end."""
        with self._changed:
            while True:
                if self._tasks:
                    return self._tasks.popleft()
                if not self._queue:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                first = self._queue[0]
                left_s = first.arrival_time + self._max_wait_s - time.perf_counter()
                alone = not self._num_expected or self._closed
                if alone or left_s <= 0 or self._num_batchable_rows(first) >= self._max_batch_size:
                    return partial(self._start_batch, self._pop_batch(first))
                self._changed.wait(left_s)

    def _num_batchable_rows(self, first: _QueuedRequest) -> int:
        return sum(each.num_rows for each in self._queue if each.can_batch_with(first))

    def _pop_batch(self, first: _QueuedRequest) -> list[_QueuedRequest]:
        """The oldest request, and those after it that go with it, as far as the bound of rows allows."""
        batch, rest, rows = [first], [], first.num_rows
        for each in list(self._queue)[1:]:
            if each.can_batch_with(first) and rows + each.num_rows <= self._max_batch_size:
                batch.append(each)
                rows += each.num_rows
            else:
                rest.append(each)
        self._queue = deque(rest)
        self._num_queued_rows -= rows
        return batch

    def _start_batch(self, batch: list[_QueuedRequest]) -> None:
        started = [each for each in batch if each.future.set_running_or_notify_cancel()]
        if started:
            self._compute(started)

    def _compute(self, batch: list[_QueuedRequest]) -> None:
        began = time.perf_counter()
        try:
            outputs = _forward(batch, self._max_batch_size)
            rows = sum(each.num_rows for each in batch)
            check_num_outputs(outputs, rows)
        except Exception as error:  # noqa: BLE001 - whatever a model raises is the answer to who asked
            self._compute_separately(batch, error)
            return
        took = time.perf_counter() - began
        parts = torch.split(outputs, [each.num_rows for each in batch])
        results = [
            InferenceResult(part, began - each.arrival_time, took, rows)
            for each, part in zip(batch, parts, strict=True)
        ]
        self._on_batch(results)
        for each, result in zip(batch, results, strict=True):
            each.future.set_result(result)

    def _compute_separately(self, batch: list[_QueuedRequest], error: Exception) -> None:
        """Compute each alone, so that a request that breaks the model fails no other."""
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for each in batch:
            self._compute([each])


def check_num_outputs(outputs: Tensor, num_rows: int) -> None:
    """See that a model gives an answer a row.

    Raises:
        ValueError: It does not.
    """
    if outputs.ndim == 0 or len(outputs) != num_rows:
        raise ValueError(f"the model gives outputs {tuple(outputs.shape)} for {num_rows} row(s)")


def _run_task(work: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
        future.set_exception(error)


def _forward(batch: list[_QueuedRequest], max_batch_size: int) -> Tensor:
    """Outputs of all rows, in order; a request with more rows than a batch may have goes through in pieces."""
    model, stored = batch[0].model, _concatenate([each.stored for each in batch])
    rows = sum(each.num_rows for each in batch)
    if rows <= max_batch_size:
        return model.outputs(stored)
    pieces = (slice(start, start + max_batch_size) for start in range(0, rows, max_batch_size))
    return torch.cat([model.outputs(_slice(stored, piece)) for piece in pieces])


def _slice(stored: TensorTree, piece: slice) -> TensorTree:
    return map_inputs(stored, lambda tensor: tensor[piece])


def _concatenate(parts: list[TensorTree]) -> TensorTree:
    return parts[0] if len(parts) == 1 else concatenate_inputs(parts)
