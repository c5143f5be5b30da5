"""The folder of a run: who may write into it, what lies in it, and how it is written."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tuneforge.errors import FolderError, TryAgainError, TuneforgeError, UsageError

RUN, STATUS, STRATEGY_STEPS, METRICS, REPORT = "run.json", "status.json", "steps.jsonl", "metrics.jsonl", "report.json"
MODEL, WEIGHTS, HARDEST_SAMPLES, TIMINGS, LOG, REPORT_HTML = (
    "model.json", "model.safetensors", "hardest_samples.json", "timings.jsonl", "log.txt", "report.html",
)  # fmt: skip
_LOCK, _TEMPORARY_SUFFIX = ".lock", ".part"


def atomic_write(path: Path, content: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write a file, at once or in parts, so that a reader sees the old one or the new one, never half of it.

    Raises:
        TryAgainError: The disk is full.
        FolderError: The place cannot be written.
    """
    whole = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.writelines([whole] if isinstance(whole, bytes) else whole)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(path, error) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON for people and programs; a number that is none becomes null."""
    atomic_write(path, json.dumps(nonfinite_to_none(value), indent=1, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: Path, *keys: str) -> Any:
    """Read a JSON file of a run folder, which holds an object with these keys, if any are named.

    Raises:
        UsageError: There is no such folder; the message offers the run whose name is nearest.
        FolderError: The file is missing or broken.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if keys and not (isinstance(content, dict) and content.keys() >= set(keys)):
            raise ValueError(f"it lacks {', '.join(keys)}")
        return content
    except FileNotFoundError:
        raise _missing_run_error(path) from None
    except (ValueError, OSError) as error:
        raise FolderError(
            f"cannot read '{path.name}'", where=str(path.parent), why=str(error), fix="restore the file, or run again"
        ) from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line; nothing where there is no file."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


def nonfinite_to_none(value: Any) -> Any:
    """Plain data in which a number that is none has become None, as JSON needs it."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nonfinite_to_none(item) for item in value]
    return value


class RunDir:
    """The folder of one run, locked while it is open: `with RunDir(path) as folder: ...`.

    Where a full disk keeps a run from beginning, what it has written is taken away again.

    Args:
        path: A new or empty folder, or None for a new one under `runs/`.
        resume: The folder of a run that goes on.
        writable: False for a process that only follows the one which holds the folder: nothing is locked or written.

    Raises:
        TryAgainError: The disk is full.
        FolderError: Another process holds it, it already holds a run, or it is not writable.
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
                fix="name another folder, or remove this one",
            )
        for path in self.path.glob(f".*.[0-9]*{_TEMPORARY_SUFFIX}"):
            if path.is_file():
                path.unlink()  # of a process that was killed while it wrote
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if isinstance(error, TryAgainError) and not self._has_started:
            self._remove_unstarted()
        if self._lock is not None:
            self._lock.close()  # which releases the lock; the kernel does so for a process that died

    def write(self, name: str, value: Any) -> None:
        """Write one JSON file, all or nothing."""
        if self.writable:
            write_json(self.path / name, value)

    def write_text(self, name: str, text: str) -> None:
        """Write one file, all or nothing."""
        if self.writable:
            atomic_write(self.path / name, text)

    def append(self, name: str, line: str) -> None:
        """Add a line to a file, all of it or nothing. The log loses it where the disk is full, and says so later.

        Raises:
            TryAgainError: The disk is full.
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
            if name != LOG or not _is_disk_full(error):
                raise write_error(self.path / name, error) from error
            self._num_lost_lines += 1
            return
        self._num_lost_lines -= missed

    def offsets(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each file so far, which are on the disk for good when this returns."""
        try:
            for name in self._unflushed.intersection(names):
                os.fsync(self._files[name].fileno())
                self._unflushed.remove(name)
        except OSError as error:
            raise write_error(self.path, error) from error
        return {name: (self.path / name).stat().st_size if (self.path / name).exists() else 0 for name in names}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Cut files back to what they held at a checkpoint."""
        for name, size in offsets.items() if self.writable else ():
            if (self.path / name).exists():
                os.truncate(self.path / name, size)

    def write_status(self, state: str, **details: Any) -> None:
        """Say how the run stands: `running`, `done`, `stopped` or `failed`, with the reason.

        Where the disk is too full to say that it failed or stopped, what made it do so is what the user is told.
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
                fix="wait for it, stop it, or name another folder",
            ) from None
        with contextlib.suppress(OSError):  # who holds it is for people; that it is held, the kernel knows
            file.truncate(0)
            file.write(f"process {os.getpid()}, started {datetime.now(UTC).isoformat(timespec='seconds')}".encode())

    def _remove_unstarted(self) -> None:
        """Delete what was written of a run that has not begun; and the folder, where it was made for it."""
        for name in (RUN, STATUS, _LOCK, *([LOG] if self._created else [])):
            (self.path / name).unlink(missing_ok=True)
        self._remove_created_dir()

    def _remove_created_dir(self) -> None:
        if self._created:
            with contextlib.suppress(OSError):  # it is not there, or something else lies in it
                self.path.rmdir()


def is_run_dir(path: Path) -> bool:
    """True for the folder of a run that has begun; one that died before it said how it stands has not."""
    return (path / RUN).exists() and (path / STATUS).exists()


def write_error(path: Path, error: OSError) -> TuneforgeError:
    """What to raise where something could not be written: `TryAgainError` for a full disk, else `FolderError`."""
    why = error.strerror or str(error)
    if not _is_disk_full(error):
        return FolderError(f"cannot write '{path}'", where="--out", why=why, fix="name a folder that you may write to")
    run = next((each for each in (path, *path.parents) if is_run_dir(each)), None)
    then = "try again" if run is None else f"go on with: tuneforge resume {shlex.quote(str(run))}"
    return TryAgainError(
        f"cannot write '{path}'",
        where=str(path.parent),
        why=why,
        fix=f"free some space there (old runs; features: tuneforge cache clear), then {then}",
    )


def _is_disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _append(file: IO[bytes], data: bytes) -> None:
    """Add all of it at the end of an unbuffered file, or nothing: half a line would be litter for whoever reads it."""
    before = os.fstat(file.fileno()).st_size
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        os.ftruncate(file.fileno(), before)
        raise


def _new_run_path() -> Path:
    """A folder under runs/ named by the time; a number is added where two start in one second."""
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
    raise FolderError("no free name under runs/", fix="give --out FOLDER")


def _missing_run_error(file: Path) -> TuneforgeError:
    """What to raise where a file of a run is missing."""
    if file.parent.is_dir():
        what = f"'{file.parent}' holds no run" if file.name == RUN else f"'{file.parent}' is not a finished run"
        fix = "name a folder that tuneforge run has written, such as runs/NAME"
        return FolderError(what, where=file.name, why="the file is missing", fix=fix)
    bases = dict.fromkeys((file.parent.parent, Path("runs")))
    runs = {each.parent.name: str(each.parent) for base in bases for each in base.glob(f"*/{RUN}")}
    near = difflib.get_close_matches(file.parent.name, runs, n=3)
    names = " or ".join(f"'{runs[name]}'" for name in near)
    return UsageError(f"there is no folder '{file.parent}'", fix=f"did you mean {names}?" if near else "check its name")
