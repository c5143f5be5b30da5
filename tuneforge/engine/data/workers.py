"""Processes that decode ahead of what is needed, alive as long as the run.

They only read, so they hold nothing that could be lost: the run ends them with SIGKILL, and they end with the run,
however it ends. One that is killed by somebody else is started again and asked for what it still owed, so the order
and the bits stay. What stops a run (Ctrl-C, SIGTERM, which a terminal sends to all its processes) is not for them.
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

from tuneforge.errors import PluginError, TryAgainError, TuneforgeError

PREFETCH_FACTOR = 2  # batches that each process has in hand
MAX_CONSECUTIVE_DEATHS = 3  # processes in a row that may die in one place without an answer
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class SampleFetcher(Protocol):
    """What the processes are given: the part of a `Source` that they need."""

    def fetch(self, indices: Tensor) -> Any:
        """The stored form of the samples at `indices`, int64 (b,)."""


@attrs.frozen(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection


@attrs.frozen
class _Failure:
    """What a process sends where fetching raised."""

    error: TuneforgeError | None
    summary: str
    trace: str


class Workers:
    """Processes that take turns: the n-th batch that is asked for is fetched by process n modulo their number.

    They start with the first batch, and serve every pass over every source until `close`.

    Args:
        num_workers: Processes.
        sources: What they can be asked for.
        log: Where it is said that one died and was started again.
    """

    def __init__(
        self, num_workers: int, sources: Sequence[SampleFetcher], log: Callable[[str], None] = lambda text: None
    ) -> None:
        self._num_workers, self._sources, self._log = num_workers, list(sources), log
        self._running: list[_Worker] = []
        self._num_requested = 0
        self._requests: dict[int, tuple[int, NDArray[Any]]] = {}  # place of the source, and rows
        self._results: dict[int, Any] = {}
        self._deaths: Counter[int] = Counter()  # since the last answer, by place of the process
        self._finalizer = weakref.finalize(self, _kill_workers, self._running, os.getpid())

    def can_fetch(self, source: SampleFetcher) -> bool:
        """True where they can be asked for samples of `source`."""
        return self._num_workers > 0 and any(each is source for each in self._sources)

    def fetch_batches(self, source: SampleFetcher, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Any]]:
        """The rows of each batch, int64 (b,), with their stored inputs, in the order that is asked.

        Raises:
            TryAgainError: Processes died one after the other over the same batches.
            PluginError: The source raised something that tuneforge does not know.
            TuneforgeError: What the source raised.
        """
        place = next(place for place, each in enumerate(self._sources) if each is source)
        self._start()
        pending: deque[tuple[int, Tensor]] = deque()
        try:
            for chosen in indices:
                pending.append((self._request(place, chosen), chosen))
                if len(pending) > PREFETCH_FACTOR * self._num_workers:
                    number, first = pending.popleft()
                    yield first, self._wait_for_result(number)
            while pending:
                number, first = pending.popleft()
                yield first, self._wait_for_result(number)
        finally:  # a pass may be left before its end
            for number, _ in pending:
                self._requests.pop(number, None)
                self._results.pop(number, None)

    def close(self) -> None:
        """End the processes; the next batch would start new ones."""
        _kill_workers(self._running, os.getpid())
        self._requests.clear()
        self._results.clear()
        self._deaths.clear()

    def _start(self) -> None:
        if self._running:
            return
        atexit.unregister(self._finalizer)
        atexit.register(self._finalizer)  # before multiprocessing's own, which would wait for them
        for number in range(self._num_workers):
            self._running.append(self._start_worker(number))

    def _start_worker(self, number: int) -> _Worker:
        on_linux = sys.platform == "linux"
        context = multiprocessing.get_context("fork") if on_linux else multiprocessing.get_context("spawn")
        with _block_signals(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # one thread there
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker_loop, args=(theirs, self._sources, os.getpid()), name=f"decoder {number}", daemon=True
            )
            process.start()
            theirs.close()
        return _Worker(process, ours)

    def _request(self, place: int, indices: Tensor) -> int:
        number = self._num_requested
        self._num_requested += 1
        self._requests[number] = (place, indices.numpy())
        self._send(number)
        return number

    def _send(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it has died, which shows where its answer is awaited
            self._running[number % self._num_workers].connection.send((number, *self._requests[number]))

    def _wait_for_result(self, number: int) -> Any:
        """The answer to batch `number`; those of other passes that come before it are put aside."""
        slot = number % self._num_workers
        while number not in self._results:
            received = self._receive(self._running[slot])
            if received is None:
                self._restart_worker(slot)
                continue
            came, answer = received
            self._deaths[slot] = 0
            if came in self._requests:
                self._results[came] = answer
        del self._requests[number]
        answer = self._results.pop(number)
        if not isinstance(answer, _Failure):
            return answer
        raise answer.error or PluginError(
            answer.summary, where="a process that decodes ahead", why=answer.trace, fix="look at the source of the data"
        )

    def _receive(self, worker: _Worker) -> tuple[int, Any] | None:
        """A batch's number and its answer; None where the process is dead."""
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
        """Start another process in place of a dead one, and ask it for what that one still owed.

        Raises:
            TryAgainError: Too many in a row died here without an answer.
        """
        dead = self._running[slot]
        dead.process.join(timeout=1)
        code = dead.process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        self._deaths[slot] += 1
        if self._deaths[slot] >= MAX_CONSECUTIVE_DEATHS:
            self.close()
            raise TryAgainError(
                f"{MAX_CONSECUTIVE_DEATHS} processes that decode ahead have died, one after the other",
                where="--workers",
                why=f"{how}; the system ends a process where memory, or shared memory (/dev/shm), runs out",
                fix="give fewer --workers or a smaller --batch-size, and go on with: tuneforge resume",
            )
        self._log(f"  warning: a data worker died ({how}); a new one replaces it")
        self._running[slot] = self._start_worker(slot)
        dead.process.close()
        dead.connection.close()
        for number in self._requests:
            if number % self._num_workers == slot and number not in self._results:
                self._send(number)


def _kill_workers(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # in a fork they are not ours
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
    """Signals that stop a run wait; a process that starts meanwhile never sees one before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_loop(connection: Connection, sources: Sequence[SampleFetcher], parent: int) -> None:
    """What a process does: fetch what is asked until the run is gone."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _exit_with_parent(parent)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, place, rows = connection.recv()
            connection.send((number, _try_fetch(sources[place], rows)))


def _try_fetch(source: SampleFetcher, indices: NDArray[Any]) -> Any:
    try:
        return source.fetch(torch.from_numpy(indices))
    except TuneforgeError as error:
        return _Failure(error, "", "")
    except Exception as error:  # noqa: BLE001 - a plugin's source may raise anything; it is raised again in the run
        return _Failure(None, f"{type(error).__name__}: {error}", traceback.format_exc())


def _exit_with_parent(parent: int) -> None:
    """Be killed when the parent dies, even of SIGKILL; elsewhere than on Linux the connection's end does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
