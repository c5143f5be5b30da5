"""The inference service that all routes share: decoding in threads, the queue, and the request log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import attrs

from tuneforge import TensorTree
from tuneforge_serve.server.dynamic_batcher import DynamicBatcher, InferenceResult
from tuneforge_serve.server.limits import Limits
from tuneforge_serve.server.model_manager import ModelManager, ServedModel
from tuneforge_serve.server.request_body import BodyReader, RequestError, busy_error
from tuneforge_serve.server.request_logger import RequestLogger
from tuneforge_serve.server.threads import limit_to_one_thread

T = TypeVar("T")
LOG = logging.getLogger("tuneforge.serve")
_NUM_DECODE_THREADS = 2
_MAX_INLINE_NUMBERS = 1000  # outputs that are described within a tenth of a millisecond


@attrs.define(eq=False)
class InferenceService:
    """What the routes share.

    Args:
        models: The served models.
        limits: Limits of the server.
        batcher: The queue before the forward pass.
        request_logger: Logs requests and predictions.
        stopping: True once a signal has told the server to stop.
        extra_metrics: Functions that return further text for `/metrics`.
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
        """Decode a request and compute its outputs.

        Args:
            model: The version of the model.
            decode: Returns the parsed request and its stored inputs (b, ...); runs in a thread.

        Raises:
            RequestError: The input is invalid, the queue is full, or the time limit is exceeded.
        """
        self.batcher.check_capacity()
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                with self.batcher.expect_request() as submit:
                    parsed, stored = await self.run_in_pool(decode)
                    future = submit(model, stored)
                return parsed, await asyncio.wrap_future(future)
        except TimeoutError:
            raise busy_error(f"there was no prediction within {self.limits.request_timeout_s:g} s") from None
        except RequestError:
            raise
        except Exception as error:
            LOG.exception("model '%s' version '%s' fails on an input", model.name, model.version)
            kind = type(error).__name__
            raise RequestError(422, f"the model fails on this input ({kind})") from None

    async def run_in_pool(self, work: Callable[[], T]) -> T:
        """Run a short function in the thread pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def run_by_size(self, work: Callable[[], T], count: int) -> T:
        """Run a function whose duration grows with `count`; in the thread pool only if that is worth the overhead."""
        return work() if count <= _MAX_INLINE_NUMBERS else await self.run_in_pool(work)

    async def run_in_own_thread(self, work: Callable[[], T]) -> T:
        """Run a function that may take seconds in a new thread, such as loading a model."""

        def run_single_threaded() -> T:
            limit_to_one_thread()
            return work()

        return await asyncio.to_thread(run_single_threaded)

    def close(self) -> None:
        """Finish the waiting requests, and stop every thread."""
        self.models.close()
        self.batcher.close()
        self._pool.shutdown()
        self.request_logger.close()
