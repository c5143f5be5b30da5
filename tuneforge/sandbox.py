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

_START_TIMEOUT_S = 120.0
_MAX_RESPONSE_BYTES = 1 << 26
_MAX_OPEN_FILES = 256
_INHERITED_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_FORBIDDEN_EVENTS = (
    "socket.", "subprocess.", "ctypes.", "shutil.", "ftplib.", "urllib.", "smtplib.", "pty.", "os.system", "os.exec",
    "os.spawn", "os.posix_spawn", "os.fork", "os.kill", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod",
    "os.chown", "os.link", "os.symlink", "os.truncate", "os.utime", "os.setxattr", "os.putenv", "signal.pthread_kill",
)  # fmt: skip
"""Audit events that a file's content has no business to cause; those of a family end with a dot."""
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class LimitError(DataError):
    """The work broke a limit: it took too long, needed too much memory, or ended its process."""


class Sandbox:
    """A process that calls one function with limits; it is killed, and started again, when a call breaks one.

    Args:
        target: The function, as `package.module:name`; its arguments and its result are JSON.
        memory_mb: Memory that the process may have in all, in MB; held where the system can (Linux).
        timeout_s: Time that a call may take.
        writable_path: The one file that it may write.
        max_file_bytes: Size that this file may reach, in bytes.
    """

    def __init__(
        self,
        target: str,
        *,
        memory_mb: int,
        timeout_s: float,
        writable_path: Path | None = None,
        max_file_bytes: int = 0,
    ) -> None:
        self.memory_mb, self.timeout_s = memory_mb, timeout_s
        self._config = {
            "target": target,
            "memory_mb": memory_mb,
            "timeout_s": timeout_s,
            "writable_path": None if writable_path is None else str(writable_path),
            "max_file_bytes": max_file_bytes,
            "parent_pid": os.getpid(),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self.peak_mb = 0.0

    def __enter__(self) -> Sandbox:
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
        self._buffer = b""

    def call(self, **arguments: Any) -> Any:
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
            raise self._exit_error() from None
        response = json.loads(self._read_line(process, self.timeout_s))
        self.peak_mb = max(self.peak_mb, response["peak_mb"])
        if response.get("memory"):
            self.close()  # what is left of its memory is in pieces
            raise LimitError(f"it needs more than {self.memory_mb} MB of memory")
        if "error" in response:
            what, where, why, fix = response["parts"]
            raise getattr(errors, response["error"], DataError)(what, where=where, why=why, fix=fix)
        return response["result"]

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(errors.__file__).parent.parent)  # the very same code, however it was found
        known = {name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ}
        paths = os.pathsep.join([root, *filter(None, [known.get("PYTHONPATH")])])
        self._process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
            [sys.executable, "-P", "-m", __name__, json.dumps(self._config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**known, **_ONE_THREAD, "PYTHONPATH": paths},
            start_new_session=True,
        )
        self._read_line(self._process, _START_TIMEOUT_S)
        return self._process

    def _read_line(self, process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
        """The next line that the process writes, within so many seconds."""
        assert process.stdout is not None
        until, pieces = time.monotonic() + timeout_s, [self._buffer]
        while b"\n" not in pieces[-1]:
            left = until - time.monotonic()
            ready = select.select([process.stdout], [], [], left)[0] if left > 0 else []
            if not ready or sum(map(len, pieces)) > _MAX_RESPONSE_BYTES:
                self.close()
                raise LimitError(f"it takes longer than {timeout_s:g} s" if not ready else "it gives endless output")
            pieces.append(os.read(process.stdout.fileno(), 1 << 16))
            if not pieces[-1]:
                raise self._exit_error()
        line, _, self._buffer = b"".join(pieces).partition(b"\n")
        return line

    def _exit_error(self) -> LimitError:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        code = self._process.returncode
        self.close()
        if code == -signal.SIGXCPU:
            return LimitError(f"it takes longer than {self.timeout_s:g} s")
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return LimitError(f"it ended the process that looked at it ({how})")


def run_worker(config: dict[str, Any]) -> None:
    """What the process does: load the function, put on the limits, answer calls until nobody asks."""
    requests, responses = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # a library that prints does not write into the answers
        os.dup2(null, number)
    module, _, name = config["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    _exit_with_parent(config["parent_pid"])
    _apply_limits(config)
    forbidden_events = _install_audit_hook(config["writable_path"])
    responses.write(b"ready\n")
    responses.flush()
    for line in requests:
        _limit_cpu_time(config["timeout_s"])
        response = _call(function, json.loads(line), forbidden_events)
        responses.write(json.dumps({**response, "peak_mb": _peak_mb()}).encode() + b"\n")
        responses.flush()


def _call(function: Any, arguments: dict[str, Any], forbidden_events: list[str]) -> dict[str, Any]:
    try:
        response = {"result": function(**arguments)}
    except MemoryError:
        return {"memory": True}
    except TuneforgeError as error:
        response = {"error": type(error).__name__, "parts": [error.what, error.where, error.why, error.fix]}
    except Exception as error:  # noqa: BLE001 - a hostile file makes decoders raise whatever they like
        response = {"error": "DataError", "parts": [f"{type(error).__name__}: {error}", "", "", ""]}
    if forbidden_events:  # even where what was refused was swallowed
        event = forbidden_events[0]
        forbidden_events.clear()
        return {"error": "UnsafeFileError", "parts": [f"its content tried to do '{event}'", "", "", ""]}
    return response


def _apply_limits(config: dict[str, Any]) -> None:
    """Limits of the system, over what the process has now."""
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": config["max_file_bytes"], "RLIMIT_NOFILE": _MAX_OPEN_FILES}
    pages = _pages()
    if pages is not None:
        mapped, resident = (each * resource.getpagesize() for each in pages)
        limits["RLIMIT_AS"] = mapped + max(0, config["memory_mb"] * 2**20 - resident)
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS knows some by name only
            resource.setrlimit(getattr(resource, name), (value, value))


def _limit_cpu_time(seconds: float) -> None:
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


def _install_audit_hook(writable_path: str | None) -> list[str]:
    """Refuse what only code would do, for good; what was refused is in the list that is given back."""
    refused: list[str] = []
    allowed = None if writable_path is None else os.path.abspath(writable_path)

    def watch(event: str, values: tuple[Any, ...]) -> None:
        writing = event == "open" and _opens_for_writing(values) and values[0] != allowed
        if writing or event.startswith(_FORBIDDEN_EVENTS):
            refused.append(event)
            raise PermissionError(f"{event} is refused here")

    sys.addaudithook(watch)
    return refused


def _opens_for_writing(values: tuple[Any, ...]) -> bool:
    _, mode, flags = values
    by_mode = isinstance(mode, str) and any(letter in mode for letter in "wax+")
    return by_mode or bool(isinstance(flags, int) and flags & _WRITE_FLAGS)


def _exit_with_parent(parent_pid: int) -> None:
    """End when the parent does, whatever ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent_pid:
            os._exit(1)


if __name__ == "__main__":
    run_worker(json.loads(sys.argv[1]))
