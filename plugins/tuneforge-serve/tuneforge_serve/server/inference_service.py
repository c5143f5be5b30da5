"""Where requests meet the model: decoding and describing off the event loop, the queue, and what is kept of it all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import attrs

from tuneforge.engine.data.dataset import TensorTree
from tuneforge_serve.server.dynamic_batcher import DynamicBatcher, InferenceResult
from tuneforge_serve.server.model_manager import ModelManager, ServedModel
from tuneforge_serve.server.request_body import BodyReader, Limits, RequestError, busy_error
from tuneforge_serve.server.request_logger import RequestLogger
from tuneforge_serve.server.threads import limit_to_one_thread

T = TypeVar("T")
LOG = logging.getLogger("tuneforge.serve")
_NUM_DECODE_THREADS = 2
_MAX_INLINE_NUMBERS = 1000  # numbers of an answer that are put into words within a tenth of a millisecond


@attrs.define(eq=False)
class InferenceService:
    """What the routes share.

    Args:
        models: Which version answers.
        limits: Bounds of the server.
        batcher: The queue before the forward pass.
        request_logger: Keeps requests and answers.
        stopping: True once the server has been told to stop.
        extra_metrics: Further text for `/metrics`, from those who add routes.
    """

    models: ModelManager
    limits: Limits
    batcher: DynamicBatcher
    request_logger: RequestLogger
    stopping: bool = False
    extra_metrics: list[Callable[[], bytes]] = attrs.field(factory=list)
    body_reader: BodyReader = attrs.field(init=False)
    _pool: ThreadPoolExecutor = attrs.field(
        factory=lambda: ThreadPoolExecutor(_NUM_DECODE_THREADS, "decode", limit_to_one_thread)
    )

    def __attrs_post_init__(self) -> None:
        self.body_reader = BodyReader(self.limits)

    async def infer(self, model: ServedModel, decode: Callable[[], tuple[T, TensorTree]]) -> tuple[T, InferenceResult]:
        """Decode a request and compute its answer.

        Args:
            model: What it is computed by.
            decode: What the request asks beside its inputs, and these as stored (b, ...); runs in a thread.

        Raises:
            RequestError: The input is none, too much waits, or it takes too long.
        """
        self.batcher.check_capacity()
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                with self.batcher.expect_request() as submit:
                    asked, stored = await self.run_in_pool(decode)
                    future = submit(model, stored)
                return asked, await asyncio.wrap_future(future)
        except TimeoutError:
            raise busy_error(f"there was no answer within {self.limits.request_timeout_s:g} s") from None
        except RequestError:
            raise
        except Exception as error:
            LOG.exception("model '%s' in version '%s' fails on an input", model.name, model.version)
            kind = type(error).__name__
            raise RequestError(422, f"the model cannot compute this input ({kind})") from None

    async def run_in_pool(self, work: Callable[[], T]) -> T:
        """Run something short in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def run_by_size(self, work: Callable[[], T], count: int) -> T:
        """Run what takes the longer the more numbers it is about; of few it is sooner done than handed over."""
        return work() if count <= _MAX_INLINE_NUMBERS else await self.run_in_pool(work)

    async def run_in_own_thread(self, work: Callable[[], T]) -> T:
        """Run something that may take seconds in a thread of its own, such as loading a model."""

        def alone() -> T:
            limit_to_one_thread()
            return work()

        return await asyncio.to_thread(alone)

    def close(self) -> None:
        """Answer what waits and end every thread."""
        self.models.close()
        self.batcher.close()
        self._pool.shutdown()
        self.request_logger.close()
