"""Worker processes that decode samples ahead of the training loop and live as long as the run.

Workers only read, so killing one loses nothing: the run ends them with SIGKILL, and they end with the run, however it
ends. A worker that is killed by something else is replaced, and the new one is sent every request that is not answered
yet, so the order of the samples stays. Workers ignore SIGINT and SIGTERM, because Ctrl-C reaches the whole process
group and the run decides itself when to stop.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import attrs
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge.engine.data.sample_seeds import FIXED_DRAW, SeededFetcher
from tuneforge.errors import PluginError, TryAgainError, TuneforgeError

PREFETCH_FACTOR = 2  # requested batches per worker
MAX_CONSECUTIVE_DEATHS = 3  # workers in a row that may die in one slot without an answer
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class SampleFetcher(Protocol):
    """The part of a `Source` that workers need."""

    def fetch(self, indices: Tensor) -> Any:
        """Return the stored form of the samples at `indices`, int64 (b,)."""


@attrs.frozen(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection


@attrs.frozen
class _Failure:
    """What a worker sends if fetching raised an error."""

    error: TuneforgeError | None
    summary: str
    trace: str


class Workers:
    """Processes that take turns: request n is fetched by process n modulo their number.

    They start with the first batch, and serve every pass over every source until `close`.

    Args:
        num_workers: Number of processes.
        sources: What samples can be fetched from.
        log: Called with a message when a worker has died and was replaced.
    """

    def __init__(
        self, num_workers: int, sources: Sequence[SampleFetcher], log: Callable[[str], None] = lambda text: None
    ) -> None:
        self._num_workers, self._sources, self._log = num_workers, list(sources), log
        self._running: list[_Worker] = []
        self._num_requested = 0
        self._requests: dict[int, tuple[int, NDArray[Any], int]] = {}  # position of the source, rows, key
        self._results: dict[int, Any] = {}
        self._deaths: Counter[int] = Counter()  # since the last answer, by slot
        self._finalizer = weakref.finalize(self, _kill_workers, self._running, os.getpid())

    def can_fetch(self, source: SampleFetcher) -> bool:
        """Return True if samples of `source` can be fetched."""
        return self._num_workers > 0 and any(each is source for each in self._sources)

    def fetch_batches(
        self, source: SampleFetcher, indices: Iterator[Tensor], key: int = FIXED_DRAW
    ) -> Iterator[tuple[Tensor, Any]]:
        """Yield the rows of each batch, int64 (b,), with their stored inputs, in the order of `indices`.

        Random samples are those of `key`; see `tuneforge.engine.data.sample_seeds`.

        Raises:
            TryAgainError: Several workers in a row died over the same batches.
            PluginError: The source raised an error that is not one of tuneforge's.
            TuneforgeError: The source raised it.
        """
        place = next(place for place, each in enumerate(self._sources) if each is source)
        self._start()
        pending: deque[tuple[int, Tensor]] = deque()
        try:
            for chosen in indices:
                pending.append((self._request(place, chosen, key), chosen))
                if len(pending) > PREFETCH_FACTOR * self._num_workers:
                    number, first = pending.popleft()
                    yield first, self._wait_for_result(number)
            while pending:
                number, first = pending.popleft()
                yield first, self._wait_for_result(number)
        finally:  # the consumer may end the pass early
            for number, _ in pending:
                self._requests.pop(number, None)
                self._results.pop(number, None)

    def close(self) -> None:
        """End the processes; the next batch starts new ones."""
        _kill_workers(self._running, os.getpid())
        self._requests.clear()
        self._results.clear()
        self._deaths.clear()

    def _start(self) -> None:
        if self._running:
            return
        atexit.unregister(self._finalizer)
        atexit.register(self._finalizer)  # runs before multiprocessing's own handler, which would wait for the workers
        for number in range(self._num_workers):
            self._running.append(self._start_worker(number))

    def _start_worker(self, number: int) -> _Worker:
        on_linux = sys.platform == "linux"
        context = multiprocessing.get_context("fork") if on_linux else multiprocessing.get_context("spawn")
        with _block_signals(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # the child uses one thread
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker_loop,
                args=(theirs, self._sources, os.getpid()),
                name=f"tuneforge-worker-{number}",
                daemon=True,
            )
            process.start()
            theirs.close()
        return _Worker(process, ours)

    def _request(self, place: int, indices: Tensor, key: int) -> int:
        number = self._num_requested
        self._num_requested += 1
        self._requests[number] = (place, indices.numpy(), key)
        self._send(number)
        return number

    def _send(self, number: int) -> None:
        with contextlib.suppress(OSError):  # the worker has died; `_wait_for_result` will notice
            self._running[number % self._num_workers].connection.send((number, *self._requests[number]))

    def _wait_for_result(self, number: int) -> Any:
        """Return the result of request `number`; results of other passes that arrive first are stored."""
        slot = number % self._num_workers
        while number not in self._results:
            received = self._receive(self._running[slot])
            if received is None:
                self._restart_worker(slot)
                continue
            received_number, result = received
            self._deaths[slot] = 0
            if received_number in self._requests:
                self._results[received_number] = result
        del self._requests[number]
        result = self._results.pop(number)
        if not isinstance(result, _Failure):
            return result
        raise result.error or PluginError(
            result.summary, where="a worker", why=result.trace, fix="look at the source of the data"
        )

    def _receive(self, worker: _Worker) -> tuple[int, Any] | None:
        """Return the number and result of a request, or None if the worker is dead."""
        try:
            if worker.connection in wait([worker.connection, worker.process.sentinel]):
                received: tuple[int, Any] = worker.connection.recv()
                return received
        except (EOFError, OSError):
            worker.process.join(timeout=1)
            if worker.process.is_alive():
                raise
        return None

    def _restart_worker(self, slot: int) -> None:
        """Start another worker in place of a dead one, and send it the requests that are not answered yet.

        Raises:
            TryAgainError: Too many workers in a row died here without an answer.
        """
        dead = self._running[slot]
        dead.process.join(timeout=1)
        code = dead.process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        self._deaths[slot] += 1
        if self._deaths[slot] >= MAX_CONSECUTIVE_DEATHS:
            self.close()
            raise TryAgainError(
                f"{MAX_CONSECUTIVE_DEATHS} workers have died one after the other",
                where="--num-workers",
                why=f"{how}; the system kills a process when memory, or shared memory (/dev/shm), runs out",
                fix="use a smaller --num-workers or --batch-size, and go on with: tuneforge resume",
            )
        self._log(f"  warning: a data worker died ({how}); a new one replaces it")
        self._running[slot] = self._start_worker(slot)
        dead.process.close()
        dead.connection.close()
        for number in self._requests:
            if number % self._num_workers == slot and number not in self._results:
                self._send(number)


def _kill_workers(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # in a forked process they are not its children
        return
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.process.close()
        worker.connection.close()
    workers.clear()


@contextlib.contextmanager
def _block_signals() -> Iterator[None]:
    """Block the signals that stop a run until a process has started, so that it can ignore them before any arrives."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_loop(connection: Connection, sources: Sequence[SampleFetcher], parent: int) -> None:
    """Fetch what is requested until the run is gone; the main function of a worker."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _exit_with_parent(parent)
    torch.set_num_threads(1)
    fetchers = [SeededFetcher(source) for source in sources]
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, place, rows, key = connection.recv()
            connection.send((number, _try_fetch(fetchers[place], rows, key)))


def _try_fetch(fetcher: SeededFetcher, indices: NDArray[Any], key: int) -> Any:
    try:
        return fetcher.fetch(torch.from_numpy(indices), key)
    except TuneforgeError as error:
        return _Failure(error, "", "")
    except Exception as error:  # noqa: BLE001 - a plugin's source may raise anything; it is raised again in the run
        return _Failure(None, f"{type(error).__name__}: {error}", traceback.format_exc())


def _exit_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent dies, even by SIGKILL.

    Only Linux has this. On other systems the worker ends when its connection is closed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
