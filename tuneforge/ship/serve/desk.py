"""Where requests meet the model: decoding and describing off the event loop, the queue, and what is kept of it all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import attrs

from tuneforge.engine.data.dataset import Inputable
from tuneforge.ship.serve.batches import Batches, Computed
from tuneforge.ship.serve.bounds import Bodies, Limits, Refusal, busy
from tuneforge.ship.serve.kept import Keeper
from tuneforge.ship.serve.models import Models, Served
from tuneforge.ship.serve.threads import keep_to_one_core

T = TypeVar("T")
LOG = logging.getLogger("tuneforge.serve")
_DECODERS = 2
_FEW = 1000  # numbers of an answer that are put into words within a tenth of a millisecond


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
    """

    models: Models
    limits: Limits
    batches: Batches
    keeper: Keeper
    stopping: bool = False
    metrics: list[Callable[[], bytes]] = attrs.field(factory=list)
    bodies: Bodies = attrs.field(init=False)
    _pool: ThreadPoolExecutor = attrs.field(factory=lambda: ThreadPoolExecutor(_DECODERS, "decode", keep_to_one_core))

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

    async def by_size(self, work: Callable[[], T], count: int) -> T:
        """Run what takes the longer the more numbers it is about; of few it is sooner done than handed over."""
        return work() if count <= _FEW else await self.aside(work)

    async def slowly(self, work: Callable[[], T]) -> T:
        """Run something that may take seconds in a thread of its own, such as loading a model."""

        def alone() -> T:
            keep_to_one_core()
            return work()

        return await asyncio.to_thread(alone)

    def close(self) -> None:
        """Answer what waits and end every thread."""
        self.models.close()
        self.batches.close()
        self._pool.shutdown()
        self.keeper.close()
