"""Requests that wait together become one forward pass.

A thread takes what waits whenever it is free. It waits for more only while requests are known to be on their way (they
arrived and are being decoded), so a lone request never waits for company; and never longer than `wait_s` from the
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

from tuneforge.engine.data.dataset import Inputable, map_inputs, tensors_of
from tuneforge.ship.serve.bounds import busy

T = TypeVar("T")


class Computes(Protocol):
    """What a batch is computed by: one version of one model."""

    def outputs(self, stored: Inputable) -> Tensor:
        """Outputs (b, k) of stored inputs (b, ...)."""


@attrs.frozen(eq=False)
class Computed:
    """What a request gets back.

    Args:
        outputs: (b, k), float32.
        waited_s: From arrival to the start of the forward pass.
        forward_s: The forward pass.
        rows: Of the whole batch that it was part of.
    """

    outputs: Tensor
    waited_s: float
    forward_s: float
    rows: int


@attrs.frozen(eq=False)
class _Waiting:
    served: Computes
    stored: Inputable
    kind: tuple[Any, ...]
    rows: int
    future: Future[Computed] = attrs.field(factory=Future)
    arrived: float = attrs.field(factory=time.perf_counter)

    def goes_with(self, other: _Waiting) -> bool:
        """True where both can be rows of one batch."""
        return self.served is other.served and self.kind == other.kind


Submit = Callable[[Computes, Inputable], "Future[Computed]"]
"""Puts stored inputs (b, ...) into the queue, to be computed by one version."""


class Batches:
    """The queue, and the thread that empties it.

    Args:
        batch_rows: Most rows of one forward pass.
        queue_rows: Most rows that wait.
        wait_s: Longest wait of a request for others that are on their way.
        seen: Is called with the results of each batch, one a request.
    """

    def __init__(
        self,
        *,
        batch_rows: int,
        queue_rows: int,
        wait_s: float,
        seen: Callable[[Sequence[Computed]], None] = lambda done: None,
    ) -> None:
        self._batch_rows, self._queue_rows, self._wait_s, self._seen = batch_rows, queue_rows, wait_s, seen
        self._waiting: deque[_Waiting] = deque()
        self._asides: deque[Callable[[], None]] = deque()
        self._rows = 0
        self._coming = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="forward", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._rows

    def check_room(self) -> None:
        """See that more may wait.

        Raises:
            Refusal: Too much waits already.
        """
        with self._changed:
            self._require_room(1)

    @contextmanager
    def coming(self) -> Iterator[Submit]:
        """While a request is on its way to the queue: others may wait for it. Gives what puts it there."""
        with self._changed:
            self._coming += 1
        arrived = False

        def submit(served: Computes, stored: Inputable) -> Future[Computed]:
            nonlocal arrived
            future = self._put(served, stored, coming=1)
            arrived = True
            return future

        try:
            yield submit
        finally:
            if not arrived:
                with self._changed:
                    self._coming -= 1
                    self._changed.notify()

    def submit(self, served: Computes, stored: Inputable) -> Future[Computed]:
        """Put rows into the queue. A cancelled future is not computed.

        Raises:
            Refusal: Too much waits already.
        """
        return self._put(served, stored, coming=0)

    def aside(self, work: Callable[[], T]) -> Future[T]:
        """Do something else in this thread, before what waits; a model is warmed where it will compute.

        Raises:
            Refusal: It is closed.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise busy("the server is stopping")
            self._asides.append(partial(_done, work, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Compute what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _put(self, served: Computes, stored: Inputable, *, coming: int) -> Future[Computed]:
        """Put rows into the queue; so many cease to be coming in the same moment, so that a lone one waits for none."""
        named = tensors_of(stored)
        kind = tuple((name, tensor.dtype, tensor.shape[1:]) for name, tensor in named.items())
        waiting = _Waiting(served, stored, kind, rows=len(next(iter(named.values()))))
        with self._changed:
            self._require_room(waiting.rows)
            self._coming -= coming
            self._waiting.append(waiting)
            self._rows += waiting.rows
            self._changed.notify()
        return waiting.future

    def _require_room(self, rows: int) -> None:
        """See that so many more may wait; alone, a request of any size may."""
        if not self._waiting or self._rows + rows <= self._queue_rows:
            return
        self._waiting = deque(each for each in self._waiting if not each.future.cancelled())
        self._rows = sum(each.rows for each in self._waiting)
        if self._waiting and self._rows + rows > self._queue_rows:
            raise busy(f"{self._rows} rows wait already")

    def _work(self) -> None:
        while work := self._next():
            work()

    def _next(self) -> Callable[[], None] | None:
        """What to do next; None at the end."""
        with self._changed:
            while True:
                if self._asides:
                    return self._asides.popleft()
                if not self._waiting:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                first = self._waiting[0]
                left_s = first.arrived + self._wait_s - time.perf_counter()
                alone = not self._coming or self._closed
                if alone or left_s <= 0 or self._fitting(first) >= self._batch_rows:
                    return partial(self._begin, self._taken(first))
                self._changed.wait(left_s)

    def _fitting(self, first: _Waiting) -> int:
        return sum(each.rows for each in self._waiting if each.goes_with(first))

    def _taken(self, first: _Waiting) -> list[_Waiting]:
        """The oldest request, and those after it that go with it, as far as the bound of rows allows."""
        batch, rest, rows = [first], [], first.rows
        for each in list(self._waiting)[1:]:
            if each.goes_with(first) and rows + each.rows <= self._batch_rows:
                batch.append(each)
                rows += each.rows
            else:
                rest.append(each)
        self._waiting = deque(rest)
        self._rows -= rows
        return batch

    def _begin(self, batch: list[_Waiting]) -> None:
        started = [each for each in batch if each.future.set_running_or_notify_cancel()]
        if started:
            self._compute(started)

    def _compute(self, batch: list[_Waiting]) -> None:
        began = time.perf_counter()
        try:
            outputs = _forward(batch, self._batch_rows)
            rows = sum(each.rows for each in batch)
            check_rows(outputs, rows)
        except Exception as error:  # noqa: BLE001 - whatever a model raises is the answer to who asked
            self._apart(batch, error)
            return
        took = time.perf_counter() - began
        parts = torch.split(outputs, [each.rows for each in batch])
        done = [Computed(part, began - each.arrived, took, rows) for each, part in zip(batch, parts, strict=True)]
        self._seen(done)
        for each, result in zip(batch, done, strict=True):
            each.future.set_result(result)

    def _apart(self, batch: list[_Waiting], error: Exception) -> None:
        """Compute each alone, so that a request that breaks the model fails no other."""
        if len(batch) == 1:
            batch[0].future.set_exception(error)
            return
        for each in batch:
            self._compute([each])


def check_rows(outputs: Tensor, rows: int) -> None:
    """See that a model gives an answer a row.

    Raises:
        ValueError: It does not.
    """
    if outputs.ndim == 0 or len(outputs) != rows:
        raise ValueError(f"the model gives outputs {tuple(outputs.shape)} for {rows} row(s)")


def _done(work: Callable[[], T], future: Future[T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
        future.set_exception(error)


def _forward(batch: list[_Waiting], most_rows: int) -> Tensor:
    """Outputs of all rows, in order; a request with more rows than a batch may have goes through in pieces."""
    served, stored = batch[0].served, _joined([each.stored for each in batch])
    rows = sum(each.rows for each in batch)
    if rows <= most_rows:
        return served.outputs(stored)
    pieces = (slice(start, start + most_rows) for start in range(0, rows, most_rows))
    return torch.cat([served.outputs(_cut(stored, piece)) for piece in pieces])


def _cut(stored: Inputable, piece: slice) -> Inputable:
    return map_inputs(stored, lambda tensor: tensor[piece])


def _joined(parts: list[Inputable]) -> Inputable:
    if len(parts) == 1:
        return parts[0]
    named = [tensors_of(part) for part in parts]
    joined = {name: torch.cat([part[name] for part in named]) for name in named[0]}
    return joined[""] if isinstance(parts[0], Tensor) else joined
