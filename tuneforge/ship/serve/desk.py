"""Where requests meet the model: decoding and describing off the event loop, the queue, and what is kept of it all."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import attrs

from tuneforge.engine.samples.data import Inputable
from tuneforge.ship.circle.records import Exchange
from tuneforge.ship.serve.batches import Batches, Computed
from tuneforge.ship.serve.bounds import Bodies, Limits, Refusal, busy
from tuneforge.ship.serve.models import Models, Served

T = TypeVar("T")
LOG = logging.getLogger("tuneforge.serve")
_DECODERS = 2
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

    def keep(self, exchange: Exchange) -> None:
        """Keep a request soon; it is dropped and counted where the disk cannot follow."""
        if self.records is not None:
            try:
                self._waiting.put_nowait(exchange)
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


@attrs.define(eq=False)
class Desk:
    """What the routes share.

    Args:
        models: Which version answers.
        limits: Bounds of the server.
        batches: The queue before the forward pass.
        keeper: Keeps requests and answers.
        stopping: True once the server has been told to stop.
        metrics: Further text for `/metrics`, from those who add routes.
        metrics: What adds to `/metrics`.
    """

    models: Models
    limits: Limits
    batches: Batches
    keeper: Keeper
    stopping: bool = False
    metrics: list[Callable[[], bytes]] = attrs.field(factory=list)
    bodies: Bodies = attrs.field(init=False)
    _pool: ThreadPoolExecutor = attrs.field(factory=lambda: ThreadPoolExecutor(_DECODERS, "decode"))

    def __attrs_post_init__(self) -> None:
        self.bodies = Bodies(self.limits)

    async def ask(self, served: Served, decode: Callable[[], tuple[T, Inputable]]) -> tuple[T, Computed]:
        """Decode a request and compute its answer.

        Args:
            served: What it is computed by.
            decode: What the request asks beside its inputs, and these as stored (b, ...); runs in a thread.

        Raises:
            Refusal: The input is none, too much waits, or it takes too long.
        """
        self.batches.check_room()
        try:
            async with asyncio.timeout(self.limits.request_s):
                with self.batches.coming() as submit:
                    asked, stored = await self.aside(decode)
                    future = submit(served, stored)
                return asked, await asyncio.wrap_future(future)
        except TimeoutError:
            raise busy(f"there was no answer within {self.limits.request_s:g} s") from None
        except Refusal:
            raise
        except Exception as error:
            LOG.exception("model '%s' in version '%s' fails on an input", served.name, served.version)
            kind = type(error).__name__
            raise Refusal(422, f"the model cannot compute this input ({kind})") from None

    async def aside(self, work: Callable[[], T]) -> T:
        """Run something short in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def slowly(self, work: Callable[[], T]) -> T:
        """Run something that may take seconds in a thread of its own, such as loading a model."""
        return await asyncio.to_thread(work)

    def close(self) -> None:
        """Answer what waits and end every thread."""
        self.models.close()
        self.batches.close()
        self._pool.shutdown()
        self.keeper.close()
