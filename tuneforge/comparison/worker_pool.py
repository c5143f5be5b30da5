"""The processes that share the runs of a race, and how they meet.

Each goes through the same story, `Study.run`. Whoever finds a run that nobody is at takes it, by locking its byte of a
file in the race's folder. The system lets go of that lock when a process ends, however it ends, so that another one
goes on with the run that a killed process was at. What came of a run is read from its folder; one process leads: it
alone speaks and decides.

On one machine the leader starts the others and only watches. Under torchrun all of them work, rank 0 too, and meet in a
folder that every machine sees and can lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import attrs
import torch
from torch import distributed

from tuneforge.engine.storage import run_dir as names
from tuneforge.engine.storage.run_dir import RunDir
from tuneforge.errors import FolderError, StoppedError, TryAgainError, UsageError

_CLAIMS = ".claims"
_LOOK_S = 0.2
_MOMENT_S = 5.0
_STOPPED = (130, 143)


class WorkerPool:
    """One process's part in a race: `with WorkerPool(path) as pool: ...`.

    Args:
        path: The race's folder.
        num_workers: Processes to start here; with any, this one only watches.
        log: Where sentences for the user go.
    """

    def __init__(self, path: Path, *, num_workers: int = 0, log: Callable[[str], None] = lambda text: None) -> None:
        self.runs_trials = num_workers == 0
        self._path, self._count, self._log = path, num_workers, log
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._claims: IO[bytes] | None = None

    def __enter__(self) -> WorkerPool:
        self._claims = (self._path / _CLAIMS).open("ab")
        self._helpers = [_helper(self._path, place, self._count) for place in range(self._count)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._claims is not None
        self._claims.close()
        try:
            for each in self._helpers:
                each.terminate()  # it saves what it is at, which nobody waits for any more
            for each in self._helpers:
                each.wait()
        finally:  # a second Ctrl-C does not wait
            for each in self._helpers:
                each.kill()
                each.communicate()

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Hold a run of the race by its number; False where another process has it."""
        assert self._claims is not None
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, number)

    def poll(self) -> None:
        """Let a moment pass, because every run that is left is taken; see that those who have them are there.

        Raises:
            StoppedError: One of them gave up, with the same exit code; it has said why.
            TryAgainError: None is left.
        """
        time.sleep(_LOOK_S)
        for each in [helper for helper in self._helpers if helper.poll()]:
            code = each.returncode
            self._helpers.remove(each)
            each.communicate()
            if code > 0 and code not in _STOPPED:
                raise StoppedError("a process of the race gave up, and said why", exit_code=code)
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._log(f"note: a process of the race was ended ({how}); {len(self._helpers)} go on with what it was at")
        if not self.runs_trials and not self._helpers:
            raise TryAgainError(
                "every process of the race was ended",
                why="nobody is left to go on",
                fix="give the same command again; an entrant that runs out of memory ends them all: leave it out",
            )


def wait_for_release(run_dir: Path) -> None:
    """Wait a moment until nobody holds a run's folder: what decoded for a killed process outlives it shortly."""
    until = time.monotonic() + _MOMENT_S
    while run_dir.exists() and time.monotonic() < until:
        with contextlib.suppress(FolderError), RunDir(run_dir, resume=True):
            return
        time.sleep(_LOOK_S)


def _helper(path: Path, place: int, count: int) -> subprocess.Popen[bytes]:
    """A process that works for the race in a folder, with its share of threads, until its standard input ends.

    It is in no terminal's reach, so that Ctrl-C is for the one that started it.
    """
    shared = {
        "OMP_NUM_THREADS": str(threads_per_process(count)),
        "LOCAL_RANK": str(place % max(1, torch.accelerator.device_count())),
        "PYTHONPATH": os.pathsep.join(os.path.abspath(each) for each in sys.path),
    }
    return subprocess.Popen(  # noqa: S603 - our own command, by our own interpreter
        [sys.executable, "-P", "-m", "tuneforge", "compare", "--resume", str(path), "--follow"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **shared},
        start_new_session=True,
    )


def threads_per_process(num_processes: int) -> int:
    """Threads of each of so many processes on this machine."""
    return max(1, torch.get_num_threads() // num_processes)


@attrs.frozen(eq=False)
class Rendezvous:
    """The ranks that torchrun has started, before any of them has begun.

    Args:
        rank: Of this process.
        store: What all of them can write and read.
        key: Of this race; a script may hold several.
    """

    rank: int
    store: Any
    key: str

    @classmethod
    def from_environment(cls) -> Rendezvous | None:
        """That of this process; None where torchrun has not started it.

        Raises:
            UsageError: The ranks already share runs, each with its part of every batch.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ:
            return None
        if distributed.is_initialized():
            raise UsageError("the ranks of a race each do runs of their own", fix="race before anything else is run")
        store, rank, _ = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store
        own = distributed.PrefixStore(f"tuneforge-race/{attempt}", store)  # type: ignore[attr-defined]
        return cls(rank, own, f"race-{own.add(f'races-of-{rank}', 1)}")

    def send_dir(self, path: Path) -> None:
        """Let the others begin."""
        self.store.set(self.key, json.dumps(os.path.abspath(path)))

    def receive_dir(self) -> Path:
        """The race's folder, once rank 0 has told it."""
        return Path(json.loads(self.store.get(self.key)))


@contextlib.contextmanager
def as_single_process() -> Iterator[None]:
    """While this lasts, a run is one process's, although torchrun has started several."""
    before = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = "1"
    try:
        yield
    finally:
        os.environ["WORLD_SIZE"] = before


def wait_until_finished(path: Path) -> None:
    """Wait until the one that leads a race has ended it.

    Raises:
        StoppedError: It has been stopped, or nobody came through.
    """
    while (state := names.read_json(path / names.STATUS)["state"]) == "running":
        time.sleep(_LOOK_S)
    if state != "done":
        raise StoppedError(f"the race {state}; rank 0 says why", exit_code=1)
