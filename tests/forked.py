"""Processes of Python that begin at once: forked from a server that has torch loaded, as `subprocess` starts them.

To import torch and torchvision takes a fresh interpreter two to four seconds, and dozens of tests start one.
`forked.Popen` and `forked.run` stand for those of `subprocess` where a test is about what a process does: it has a
process id, a session and a working directory of its own, an environment, arguments and pipes of its own, dies by the
signals that it is sent, and ends as any interpreter does. What it shares with the others is what was imported before
it began, and the seed of hashes. A test that is about either, and one that sets options of the interpreter that the
server does not know (`-I`, `-S`, ...), starts a fresh one; so does every test where there is no Linux.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

PRELOADED = (
    "torch", "torch.distributed", "torchvision", "sklearn.linear_model", "scipy.stats", "matplotlib.figure",
    "PIL.Image", "tuneforge", "tuneforge.cli.run", "tuneforge.report.report", "tuneforge.exporting.exporter",
)  # fmt: skip
"""What a process finds imported. Not what a test could miss: no plugin of tuneforge's own, and no test."""

_SIZE = 200_000  # bytes of a request, at most; Linux takes somewhat more in one piece


class Popen:
    """A process of this interpreter; what it is given and has are those of `subprocess.Popen` that the tests use.

    Args:
        command: `sys.executable`, perhaps `-W error` or `-P`, and a script, `-m` and a module, or `-c` and a source.
        cwd: Its working directory.
        env: Its environment; this one by default.
        stdin: PIPE, or None for nothing to read.
        stdout: A file, PIPE, DEVNULL or None for where this process prints.
        stderr: The same, or STDOUT.
        text: Pipes give text. They always do here, so it must be true where there is one.
        start_new_session: It leads a process group of its own.
    """

    def __init__(
        self,
        command: Sequence[Any],
        *,
        cwd: Any = None,
        env: Mapping[str, str] | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = False,
        start_new_session: bool = False,
    ) -> None:
        assert text or subprocess.PIPE not in (stdout, stderr)
        self.args = [str(each) for each in command]
        assert self.args[0] == sys.executable
        self.returncode: int | None = None
        assert stdin in (None, subprocess.PIPE)
        given, write = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), None)
        self.stdin = None if write is None else os.fdopen(write, "wb")
        self.stdout, out = _opened(stdout, 1)
        self.stderr, err = (None, out) if stderr == subprocess.STDOUT else _opened(stderr, 2)
        self._read: dict[str, str] = {}
        self._readers: list[threading.Thread] = []
        asked = {
            "argv": self.args[1:],
            "cwd": os.path.abspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._connection.connect(_server())
            content = json.dumps(asked).encode()
            assert len(content) < _SIZE
            socket.send_fds(self._connection, [content], [given, out, err])
            self.pid = int(self._connection.recv(64))
        finally:
            for each in {given, out, err} - {1, 2}:
                if each not in (_number(stdout), _number(stderr)):
                    os.close(each)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                file.close()
        self.wait()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended."""
        if self.returncode is None:
            if timeout is not None and not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._connection.recv(64))
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """All that it has printed, once it has ended; it has nothing more to read."""
        if self.stdin is not None:
            self.stdin.close()
        until = None if timeout is None else time.monotonic() + timeout
        if not self._readers:
            pipes = {name: getattr(self, name) for name in ("stdout", "stderr")}
            self._readers = [
                threading.Thread(target=self._drain, args=(name, file), daemon=True)
                for name, file in pipes.items()
                if file is not None and not file.closed
            ]
            for each in self._readers:
                each.start()
        for each in self._readers:
            each.join(None if until is None else max(0.0, until - time.monotonic()))
            if each.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return self._read.get("stdout"), self._read.get("stderr")

    def _drain(self, name: str, file: Any) -> None:
        self._read[name] = file.read()
        file.close()

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing happens where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[Any], *, capture_output: bool = False, check: bool = False, timeout: float | None = None,
    **given: Any,
) -> subprocess.CompletedProcess[Any]:  # fmt: skip
    """Start it and wait for its end, as `subprocess.run` does."""
    if capture_output:
        given |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Popen(command, **given)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    if check:
        done.check_returncode()
    return done


def _number(file: Any) -> int | None:
    return file.fileno() if hasattr(file, "fileno") else None


def _opened(asked: Any, own: int) -> tuple[Any, int]:
    """Our end, where there is a pipe, and the number of its end."""
    if asked == subprocess.PIPE:
        ours, theirs = os.pipe()
        return open(ours, encoding="utf-8"), theirs
    if asked == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY)
    return None, own if asked is None else asked.fileno()


# The server

_started: dict[str, Any] = {}


def _server() -> str:
    """Its address; it starts at the first question and ends with this process."""
    if not _started:
        folder = tempfile.mkdtemp(prefix="forked-")
        path = os.path.join(folder, "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        listener.listen(64)
        lives, until = os.pipe()
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(listener.fileno()), str(lives)],
            pass_fds=[listener.fileno(), lives],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        os.close(lives)
        _started.update(path=path, listener=listener, until=until, process=process)
        atexit.register(_end, folder)
    return _started["path"]


def _end(folder: str) -> None:
    os.close(_started["until"])
    _started["listener"].close()
    _started["process"].wait()
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    os.rmdir(folder)


def serve(listener: socket.socket, lives: int) -> dict[str, Any] | None:
    """Fork a process for each question and tell how it ends; returns in the forked one, with what it is to do."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by descriptor of the process
    while True:
        ready = select.select([listener, lives, *running], [], [])[0]
        if lives in ready:
            return None
        for each in [each for each in ready if each in running]:
            pid, asker = running.pop(each)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):  # nobody waits for it
                asker.send(str(code).encode())
            asker.close()
            os.close(each)
        if listener not in ready:
            continue
        asker, _ = listener.accept()
        content, given, _, _ = socket.recv_fds(asker, _SIZE, 3)
        pid = os.fork()
        if not pid:
            for descriptor, (_, other) in running.items():
                os.close(descriptor)
                other.close()
            asker.close()
            listener.close()
            os.close(lives)
            asked = json.loads(content)
            if asked["session"]:
                os.setsid()
            for number, each in enumerate(given):
                os.dup2(each, number)
                os.close(each)
            return asked
        for each in given:
            os.close(each)
        running[os.pidfd_open(pid)] = pid, asker
        asker.send(str(pid).encode())


def become(asked: dict[str, Any], path: list[str]) -> None:
    """Be the interpreter that was asked for."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    assert os.environ.get("OMP_NUM_THREADS", "1") == "1"
    argv = asked["argv"]
    strict = os.environ.get("PYTHONWARNINGS", "")
    if argv[0] == "-W":
        strict, argv = argv[1], argv[2:]
    assert strict in ("", "error")
    if strict:
        sys.warnoptions[:] = [strict]
        warnings.simplefilter("error")
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    numpy = sys.modules["numpy"]
    numpy.random.seed()
    further = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    safe, argv = argv[0] == "-P", argv[argv[0] == "-P" :]
    kind, *words = argv if argv[0] in ("-m", "-c") else ("", *argv)
    assert not words[0].startswith("-")
    first = {"-m": os.getcwd(), "-c": "", "": os.path.dirname(os.path.abspath(words[0]))}[kind]
    sys.path[:] = [*([] if safe else [first]), *further, *path]
    sys.path_importer_cache.clear()
    sys.argv[:] = ["-c" if kind == "-c" else words[0], *words[1:]]
    if kind == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    import importlib

    path = sys.path[1:]  # without this file's folder
    sys.path[:] = path
    for name in PRELOADED:
        importlib.import_module(name)
    import gc

    gc.collect()
    gc.freeze()
    listener = socket.socket(fileno=int(sys.argv[1]))
    asked = serve(listener, int(sys.argv[2]))
    if asked is not None:
        become(asked, path)


if __name__ == "__main__":
    main()
elif sys.platform != "linux":
    Popen, run = subprocess.Popen, subprocess.run  # type: ignore[misc, assignment]
