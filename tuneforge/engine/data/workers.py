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

AHEAD = 2  # batches that each process has in hand
TRIES = 3  # processes in a row that may die in one place without an answer
_STOPPING = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Fetching(Protocol):
    """What the processes are given: the part of a `Source` that they need."""

    def fetch(self, rows: Tensor) -> Any:
        """The stored form of the samples at `rows`, int64 (b,)."""


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
        count: Processes.
        sources: What they can be asked for.
        say: Where it is said that one died and was started again.
    """

    def __init__(self, count: int, sources: Sequence[Fetching], say: Callable[[str], None] = lambda text: None) -> None:
        self._count, self._sources, self._say = count, list(sources), say
        self._started: list[_Worker] = []
        self._asked = 0
        self._wanted: dict[int, tuple[int, NDArray[Any]]] = {}  # place of the source, and rows
        self._arrived: dict[int, Any] = {}
        self._deaths: Counter[int] = Counter()  # since the last answer, by place of the process
        self._end = weakref.finalize(self, _end, self._started, os.getpid())

    def serve(self, source: Fetching) -> bool:
        """True where they can be asked for samples of `source`."""
        return self._count > 0 and any(each is source for each in self._sources)

    def fetched(self, source: Fetching, rows: Iterator[Tensor]) -> Iterator[tuple[Tensor, Any]]:
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
            for chosen in rows:
                pending.append((self._ask(place, chosen), chosen))
                if len(pending) > AHEAD * self._count:
                    number, first = pending.popleft()
                    yield first, self._answer(number)
            while pending:
                number, first = pending.popleft()
                yield first, self._answer(number)
        finally:  # a pass may be left before its end
            for number, _ in pending:
                self._wanted.pop(number, None)
                self._arrived.pop(number, None)

    def close(self) -> None:
        """End the processes; the next batch would start new ones."""
        _end(self._started, os.getpid())
        self._wanted.clear()
        self._arrived.clear()
        self._deaths.clear()

    def _start(self) -> None:
        if self._started:
            return
        atexit.unregister(self._end)
        atexit.register(self._end)  # before multiprocessing's own, which would wait for them
        for number in range(self._count):
            self._started.append(self._new(number))

    def _new(self, number: int) -> _Worker:
        on_linux = sys.platform == "linux"
        context = multiprocessing.get_context("fork") if on_linux else multiprocessing.get_context("spawn")
        with _signals_held(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # one thread there
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, self._sources, os.getpid()), name=f"decoder {number}", daemon=True
            )
            process.start()
            theirs.close()
        return _Worker(process, ours)

    def _ask(self, place: int, rows: Tensor) -> int:
        number = self._asked
        self._asked += 1
        self._wanted[number] = (place, rows.numpy())
        self._send(number)
        return number

    def _send(self, number: int) -> None:
        with contextlib.suppress(OSError):  # it has died, which shows where its answer is awaited
            self._started[number % self._count].connection.send((number, *self._wanted[number]))

    def _answer(self, number: int) -> Any:
        """The answer to batch `number`; those of other passes that come before it are put aside."""
        slot = number % self._count
        while number not in self._arrived:
            received = self._received(self._started[slot])
            if received is None:
                self._replace(slot)
                continue
            came, answer = received
            self._deaths[slot] = 0
            if came in self._wanted:
                self._arrived[came] = answer
        del self._wanted[number]
        answer = self._arrived.pop(number)
        if not isinstance(answer, _Failure):
            return answer
        raise answer.error or PluginError(
            answer.summary, where="a process that decodes ahead", why=answer.trace, fix="look at the source of the data"
        )

    def _received(self, worker: _Worker) -> tuple[int, Any] | None:
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

    def _replace(self, slot: int) -> None:
        """Start another process in place of a dead one, and ask it for what that one still owed.

        Raises:
            TryAgainError: Too many in a row died here without an answer.
        """
        dead = self._started[slot]
        dead.process.join(timeout=1)
        code = dead.process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        self._deaths[slot] += 1
        if self._deaths[slot] >= TRIES:
            self.close()
            raise TryAgainError(
                f"{TRIES} processes that decode ahead have died, one after the other",
                where="--workers",
                why=f"{how}; the system ends a process where memory, or shared memory (/dev/shm), runs out",
                fix="give fewer --workers or a smaller --batch-size, and go on with: tuneforge resume",
            )
        self._say(f"  warning: a process that decodes ahead has died ({how}); another one goes on in its place")
        self._started[slot] = self._new(slot)
        dead.process.close()
        dead.connection.close()
        for number in self._wanted:
            if number % self._count == slot and number not in self._arrived:
                self._send(number)


def _end(workers: list[_Worker], owner: int) -> None:
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
def _signals_held() -> Iterator[None]:
    """Signals that stop a run wait; a process that starts meanwhile never sees one before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, sources: Sequence[Fetching], parent: int) -> None:
    """What a process does: fetch what is asked until the run is gone."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, place, rows = connection.recv()
            connection.send((number, _attempted(sources[place], rows)))


def _attempted(source: Fetching, rows: NDArray[Any]) -> Any:
    try:
        return source.fetch(torch.from_numpy(rows))
    except TuneforgeError as error:
        return _Failure(error, "", "")
    except Exception as error:  # noqa: BLE001 - a plugin's source may raise anything; it is raised again in the run
        return _Failure(None, f"{type(error).__name__}: {error}", traceback.format_exc())


def _die_with(parent: int) -> None:
    """Be killed when the parent dies, even of SIGKILL; elsewhere than on Linux the connection's end does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
