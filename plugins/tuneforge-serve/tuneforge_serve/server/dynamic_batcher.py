"""Dynamic batching: requests that wait at the same time are computed in one forward pass.

A thread takes the waiting requests whenever it is free. It waits for more only while other requests are being decoded,
so a single request never waits; and never longer than `max_wait_s` after the oldest request of the batch arrived.
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

from tuneforge import TensorTree, map_inputs
from tuneforge.exporting import concatenate_inputs, named_tensors
from tuneforge_serve.server.request_body import busy_error

T = TypeVar("T")


class SupportsOutputs(Protocol):
    """A version of a model that computes outputs."""

    def outputs(self, stored: TensorTree) -> Tensor:
        """Return the outputs (b, k) of stored inputs (b, ...)."""


@attrs.frozen(eq=False)
class InferenceResult:
    """The outputs of one request.

    Args:
        outputs: Model outputs (b, k), float32.
        queue_s: Seconds from the arrival to the start of the forward pass.
        forward_s: Duration of the forward pass in seconds.
        batch_size: The number of samples of the whole batch.
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
        """Return True if both requests can be part of one batch."""
        return self.model is other.model and self.signature == other.signature


Submit = Callable[[SupportsOutputs, TensorTree], "Future[InferenceResult]"]
"""Puts stored inputs (b, ...) into the queue of a model."""


class DynamicBatcher:
    """A queue of requests, and the thread that computes them.

    Args:
        max_batch_size: Most samples of a forward pass.
        max_queue_size: Most samples that wait.
        max_wait_s: Longest time a request waits for others that are being decoded, in seconds.
        on_batch: Called with the results of each batch, one per request.
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
        """The number of samples that wait."""
        return self._num_queued_rows

    def check_capacity(self) -> None:
        """Check that the queue is not full.

        Raises:
            RequestError: The queue is full.
        """
        with self._changed:
            self._require_capacity(1)

    @contextmanager
    def expect_request(self) -> Iterator[Submit]:
        """Let other requests wait for this one while the block decodes it; yield the function that submits it."""
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
        """Put stored inputs (b, ...) into the queue; they are not computed if the future is canceled.

        Raises:
            RequestError: The queue is full.
        """
        return self._enqueue(model, stored, num_expected=0)

    def run_task(self, work: Callable[[], T]) -> Future[T]:
        """Run a function in the thread of the forward passes, before the waiting requests.

        A new version is warmed up there, because torch sets up its thread pools per thread.

        Raises:
            RequestError: The batcher is closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise busy_error("the server is stopping")
            self._tasks.append(partial(_run_task, work, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Compute the waiting requests, then stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _enqueue(self, model: SupportsOutputs, stored: TensorTree, *, num_expected: int) -> Future[InferenceResult]:
        """Put a request into the queue, and in the same step lower the number of expected requests."""
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
        """Check that more samples may wait; an empty queue takes a request of any size."""
        if not self._queue or self._num_queued_rows + rows <= self._max_queue_size:
            return
        self._queue = deque(each for each in self._queue if not each.future.cancelled())
        self._num_queued_rows = sum(each.num_rows for each in self._queue)
        if self._queue and self._num_queued_rows + rows > self._max_queue_size:
            raise busy_error(f"the queue is full ({self._num_queued_rows} samples)")

    def _run(self) -> None:
        while work := self._next_task():
            work()

    def _next_task(self) -> Callable[[], None] | None:
        """Wait for the next task; return None at the end."""
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
        """Remove the oldest request from the queue, with later ones that fit into its batch."""
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
        start = time.perf_counter()
        try:
            outputs = _forward(batch, self._max_batch_size)
            rows = sum(each.num_rows for each in batch)
            check_num_outputs(outputs, rows)
        except Exception as error:  # noqa: BLE001 - the futures pass on whatever a model raises
            self._compute_separately(batch, error)
            return
        seconds = time.perf_counter() - start
        parts = torch.split(outputs, [each.num_rows for each in batch])
        results = [
            InferenceResult(part, start - each.arrival_time, seconds, rows)
            for each, part in zip(batch, parts, strict=True)
        ]
        self._on_batch(results)
        for each, result in zip(batch, results, strict=True):
            each.future.set_result(result)

    def _compute_separately(self, batch: list[_QueuedRequest], error: Exception) -> None:
        """Compute each request by itself, so that one that breaks the model fails no other."""
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for each in batch:
            self._compute([each])


def check_num_outputs(outputs: Tensor, num_rows: int) -> None:
    """Check that a model returns one output per sample.

    Raises:
        ValueError: It does not.
    """
    if outputs.ndim == 0 or len(outputs) != num_rows:
        raise ValueError(f"the model returns outputs {tuple(outputs.shape)} for {num_rows} sample(s)")


def _run_task(work: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - the future passes it on
        future.set_exception(error)


def _forward(batch: list[_QueuedRequest], max_batch_size: int) -> Tensor:
    """Return the outputs of all samples, in order; a request larger than a batch is computed in several passes."""
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
