"""Work that a hostile file could break, in a process of its own with limits on memory, time and what it may touch.

The limits are the system's (setrlimit, a clock, SIGKILL) and hold whatever a file does to a decoder. Beside them, an
audit hook of the interpreter refuses sockets, processes and writing: what Python code could do with a file's content.
What the process answers is JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tuneforge import errors
from tuneforge.errors import DataError, TuneforgeError

_START_S = 120.0
_LARGEST_ANSWER = 1 << 26
_OPEN_FILES = 256
_KEPT_NAMES = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_REFUSED = (
    "socket.", "subprocess.", "ctypes.", "shutil.", "ftplib.", "urllib.", "smtplib.", "pty.", "os.system", "os.exec",
    "os.spawn", "os.posix_spawn", "os.fork", "os.kill", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod",
    "os.chown", "os.link", "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.putenv", "signal.pthread_kill",
)  # fmt: skip
"""Audit events that a file's content has no business to cause; those of a family end with a dot."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class LimitError(DataError):
    """The work broke a limit: it took too long, needed too much memory, or ended its process."""


class Limited:
    """A process that calls one function with limits; it is killed, and started again, when a call breaks one.

    Args:
        target: The function, as `package.module:name`; its arguments and its result are JSON.
        memory_mb: Memory that the process may have in all, in MB; held where the system can (Linux).
        seconds: Time that a call may take.
        writes: The one file that it may write.
        largest: Size that this file may reach, in bytes.
    """

    def __init__(
        self, target: str, *, memory_mb: int, seconds: float, writes: Path | None = None, largest: int = 0
    ) -> None:
        self.memory_mb, self.seconds = memory_mb, seconds
        self._order = {
            "target": target,
            "memory_mb": memory_mb,
            "seconds": seconds,
            "writes": None if writes is None else str(writes),
            "largest": largest,
            "parent": os.getpid(),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.peak_mb = 0.0

    def __enter__(self) -> Limited:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process; the next call would start another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._rest = b""

    def ask(self, **arguments: Any) -> Any:
        """Call the function.

        Returns:
            Its result.

        Raises:
            LimitError: The call broke a limit.
            TuneforgeError: What the function raised; another exception becomes a `DataError` that names it.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(arguments).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise self._ended() from None
        answer = json.loads(self._line(process, self.seconds))
        self.peak_mb = max(self.peak_mb, answer["peak_mb"])
        if answer.get("memory"):
            self.close()  # what is left of its memory is in pieces
            raise LimitError(f"it needs more than {self.memory_mb} MB of memory")
        if "error" in answer:
            what, where, why, fix = answer["parts"]
            raise getattr(errors, answer["error"], DataError)(what, where=where, why=why, fix=fix)
        return answer["result"]

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(errors.__file__).parent.parent)  # the very same code, however it was found
        known = {name: os.environ[name] for name in _KEPT_NAMES if name in os.environ}
        paths = os.pathsep.join([root, *filter(None, [known.get("PYTHONPATH")])])
        self._process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
            [sys.executable, "-P", "-m", __name__, json.dumps(self._order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**known, **_ONE_THREAD, "PYTHONPATH": paths},
            start_new_session=True,
        )
        self._line(self._process, _START_S)
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line that the process writes, within so many seconds."""
        assert process.stdout is not None
        until, pieces = time.monotonic() + seconds, [self._rest]
        while b"\n" not in pieces[-1]:
            left = until - time.monotonic()
            ready = select.select([process.stdout], [], [], left)[0] if left > 0 else []
            if not ready or sum(map(len, pieces)) > _LARGEST_ANSWER:
                self.close()
                raise LimitError(f"it takes longer than {seconds:g} s" if not ready else "it gives endless output")
            pieces.append(os.read(process.stdout.fileno(), 1 << 16))
            if not pieces[-1]:
                raise self._ended()
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        return line

    def _ended(self) -> LimitError:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        code = self._process.returncode
        self.close()
        if code == -signal.SIGXCPU:
            return LimitError(f"it takes longer than {self.seconds:g} s")
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return LimitError(f"it ended the process that looked at it ({how})")


def serve(order: dict[str, Any]) -> None:
    """What the process does: load the function, put on the limits, answer calls until nobody asks."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # a library that prints does not write into the answers
        os.dup2(null, number)
    module, _, name = order["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    _die_with(order["parent"])
    _limit(order)
    refused = _forbid(order["writes"])
    answers.write(b"ready\n")
    answers.flush()
    for line in requests:
        _limit_time(order["seconds"])
        answer = _attempt(function, json.loads(line), refused)
        answers.write(json.dumps({**answer, "peak_mb": _peak_mb()}).encode() + b"\n")
        answers.flush()


def _attempt(function: Any, arguments: dict[str, Any], refused: list[str]) -> dict[str, Any]:
    try:
        answer = {"result": function(**arguments)}
    except MemoryError:
        return {"memory": True}
    except TuneforgeError as error:
        answer = {"error": type(error).__name__, "parts": [error.what, error.where, error.why, error.fix]}
    except Exception as error:  # noqa: BLE001 - a hostile file makes decoders raise whatever they like
        answer = {"error": "DataError", "parts": [f"{type(error).__name__}: {error}", "", "", ""]}
    if refused:  # even where what was refused was swallowed
        event = refused[0]
        refused.clear()
        return {"error": "UnsafeFileError", "parts": [f"its content tried to do '{event}'", "", "", ""]}
    return answer


def _limit(order: dict[str, Any]) -> None:
    """Limits of the system, over what the process has now."""
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": order["largest"], "RLIMIT_NOFILE": _OPEN_FILES}
    pages = _pages()
    if pages is not None:
        mapped, resident = (each * resource.getpagesize() for each in pages)
        limits["RLIMIT_AS"] = mapped + max(0, order["memory_mb"] * 2**20 - resident)
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS knows some by name only
            resource.setrlimit(getattr(resource, name), (value, value))


def _limit_time(seconds: float) -> None:
    """Processor time for the next call, in case that nobody is left to look at the clock."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _pages() -> tuple[int, int] | None:
    """Pages that the process has mapped, and those in memory; None where the system does not say."""
    try:
        mapped, resident, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return None
    return int(mapped), int(resident)


def _peak_mb() -> float:
    """Most memory that the process has had, in MB; `ru_maxrss` would count what it was before it was itself."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


def _forbid(writes: str | None) -> list[str]:
    """Refuse what only code would do, for good; what was refused is in the list that is given back."""
    refused: list[str] = []
    allowed = None if writes is None else os.path.abspath(writes)

    def watch(event: str, values: tuple[Any, ...]) -> None:
        writing = event == "open" and _writes(values) and values[0] != allowed
        if writing or event.startswith(_REFUSED):
            refused.append(event)
            raise PermissionError(f"{event} is refused here")

    sys.addaudithook(watch)
    return refused


def _writes(values: tuple[Any, ...]) -> bool:
    _, mode, flags = values
    by_mode = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    return by_mode or bool(isinstance(flags, int) and flags & _WRITING)


def _die_with(parent: int) -> None:
    """End when the parent does, whatever ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
