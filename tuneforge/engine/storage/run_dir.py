"""The run directory: who may write into it, and how files in it are written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tuneforge.engine.storage.atomic import TEMPORARY_SUFFIX, is_disk_full
from tuneforge.engine.storage.atomic import atomic_write as atomic_write
from tuneforge.engine.storage.atomic import nonfinite_to_none as nonfinite_to_none
from tuneforge.engine.storage.atomic import write_error as write_error
from tuneforge.engine.storage.atomic import write_json as write_json
from tuneforge.engine.storage.run_files import HARDEST_SAMPLES as HARDEST_SAMPLES
from tuneforge.engine.storage.run_files import LOG as LOG
from tuneforge.engine.storage.run_files import METRICS as METRICS
from tuneforge.engine.storage.run_files import MODEL as MODEL
from tuneforge.engine.storage.run_files import REPORT as REPORT
from tuneforge.engine.storage.run_files import REPORT_HTML as REPORT_HTML
from tuneforge.engine.storage.run_files import RUN as RUN
from tuneforge.engine.storage.run_files import STATUS as STATUS
from tuneforge.engine.storage.run_files import STRATEGY_STEPS as STRATEGY_STEPS
from tuneforge.engine.storage.run_files import TIMINGS as TIMINGS
from tuneforge.engine.storage.run_files import WEIGHTS as WEIGHTS
from tuneforge.engine.storage.run_files import is_run_dir as is_run_dir
from tuneforge.engine.storage.run_files import read_json as read_json
from tuneforge.engine.storage.run_files import read_jsonl as read_jsonl
from tuneforge.errors import FolderError, TryAgainError

_LOCK = ".lock"


class RunDir:
    """The directory of one run, locked while it is open: `with RunDir(path) as run_dir: ...`.

    If the disk is full before the run has begun, everything that was written is deleted again.

    Args:
        path: A new or empty directory, or None for a new one under `runs/`.
        resume: True to open the directory of a run that is resumed.
        writable: False for a rank other than 0: it neither locks the directory nor writes into it.

    Raises:
        TryAgainError: The disk is full.
        FolderError: Another process has locked it, it already holds a run, or it is not writable.
    """

    def __init__(self, path: Path | None, *, resume: bool = False, writable: bool = True) -> None:
        self.path = path if path is not None else _new_run_path()
        self.writable = writable
        self._resume = resume
        self._created = path is None
        self._files: dict[str, IO[bytes]] = {}
        self._lock: IO[bytes] | None = None
        self._unflushed: set[str] = set()
        self._num_lost_lines = 0
        self._has_started = resume
        self.state = ""

    def __enter__(self) -> RunDir:
        if not self.writable:
            return self
        try:
            self._created = self._created or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("a+b", buffering=0)
        except OSError as error:
            self._remove_created_dir()
            raise write_error(self.path, error) from error
        self._acquire_lock(self._lock)
        if is_run_dir(self.path) and not self._resume:
            self.__exit__(None, None, None)
            raise FolderError(
                f"'{self.path}' already holds a run",
                where="--out",
                why="a run never writes over another",
                fix="name another directory, or remove this one",
            )
        for path in self.path.glob(f".*.[0-9]*{TEMPORARY_SUFFIX}"):
            if path.is_file():
                path.unlink()  # left by a process that was killed while it wrote
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if isinstance(error, TryAgainError) and not self._has_started:
            self._remove_unstarted()
        if self._lock is not None:
            self._lock.close()  # this releases the lock; the kernel does so for a process that died

    def write(self, name: str, value: Any) -> None:
        """Write one JSON file atomically."""
        if self.writable:
            write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file atomically."""
        if self.writable:
            atomic_write(self.path / name, text)

    def append(self, name: str, line: str) -> None:
        """Append a line to a file, as a whole or not at all.

        A full disk does not stop the log: its lines are dropped, and their number is written once there is room.

        Raises:
            TryAgainError: The disk is full, and the file is not the log.
        """
        if not self.writable:
            return
        missed = self._num_lost_lines if name == LOG else 0
        text = (f"({missed} line(s) are missing here: the disk was full)\n" if missed else "") + f"{line}\n"
        try:
            if name not in self._files:
                self._files[name] = (self.path / name).open("ab", buffering=0)
            _append(self._files[name], text.encode())
            self._unflushed.add(name)
        except OSError as error:
            if name != LOG or not is_disk_full(error):
                raise write_error(self.path / name, error) from error
            self._num_lost_lines += 1
            return
        self._num_lost_lines -= missed

    def offsets(self, names: Iterable[str]) -> dict[str, int]:
        """Return the size of each file in bytes, after its content has been flushed to the disk.

        A checkpoint stores these sizes, so no line before them may be lost once the checkpoint exists.
        """
        try:
            for name in self._unflushed.intersection(names):
                os.fsync(self._files[name].fileno())
                self._unflushed.remove(name)
        except OSError as error:
            raise write_error(self.path, error) from error
        return {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0 for name in names}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Truncate files to the sizes that they had at a checkpoint."""
        for name, size in offsets.items() if self.writable else ():
            if (self.path / name).exists():
                os.truncate(self.path / name, size)

    def write_status(self, state: str, **details: Any) -> None:
        """Write the run's status: `running`, `done`, `stopped` or `failed`, with details such as the reason.

        If the disk is too full for `failed` or `stopped`, the old status stays, and the user sees the error that ended
        the run instead of this one.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self.write(STATUS, {"state": state, "pid": os.getpid(), "parent": os.getppid(), "time": now, **details})
        except TryAgainError:
            if state in ("running", "done"):
                raise
        self.state = state
        self._has_started = self._has_started or state == "running"

    def _acquire_lock(self, file: IO[bytes]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            file.close()
            self._lock = None
            raise FolderError(
                f"'{self.path}' is in use",
                where="--out",
                why=f"{holder} is running in it",
                fix="wait for it, stop it, or name another directory",
            ) from None
        with contextlib.suppress(OSError):  # this text only informs people; the kernel holds the lock
            file.truncate(0)
            file.write(f"process {os.getpid()}, started {datetime.now(UTC).isoformat(timespec='seconds')}".encode())

    def _remove_unstarted(self) -> None:
        """Delete the files of a run that has not begun, and the directory if it was created for the run."""
        for name in (RUN, STATUS, _LOCK, *([LOG] if self._created else [])):
            (self.path / name).unlink(missing_ok=True)
        self._remove_created_dir()

    def _remove_created_dir(self) -> None:
        if self._created:
            with contextlib.suppress(OSError):  # it does not exist, or it holds other files
                self.path.rmdir()


def _append(file: IO[bytes], data: bytes) -> None:
    """Append data to an unbuffered file, as a whole or not at all: a reader cannot parse half a line of JSON."""
    before = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


def _new_run_path() -> Path:
    """Create and return a directory under runs/ named by the time; a number is added if two start in one second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 10_000):
        path = Path("runs") / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise write_error(path, error) from error
        return path
    raise FolderError("no free name under runs/", fix="give --out DIRECTORY")
