"""A simulated disk that is full at one write or from then on, and a run small enough to fail at each of its writes."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from tiny import blobs, tiny_data
from torch import nn

import tuneforge as tf
from tuneforge.plugin import StrategyStep


@tf.component(api=1)
class Few:
    """The tiny dataset with 32 training samples."""

    @tf.hookimpl
    def data_prepare(self, run: tf.Run) -> tf.Data:
        return attrs.evolve(tiny_data(), train=blobs(32, seed=1))


@tf.component(api=1)
class Net:
    """A body that is worth caching, and a head: (batch, 8) -> (batch, 3)."""

    @tf.hookimpl
    def model_adapt(self, run: tf.Run, model: tf.Model | None) -> tf.Model:
        body = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tf.Model.from_module(nn.Sequential(body, nn.Dropout(0.3), nn.Linear(8, 3)), head="2")


@tf.component(api=1)
class Two:
    """A phase with a cached frozen body, and one that trains everything."""

    @tf.hookimpl
    def finetune_strategy(self, task: tf.TaskInfo) -> list[StrategyStep]:
        return [tf.Phase("head", train="head", epochs=1, lr=0.02), tf.Phase("all", epochs=1, lr=0.01)]


class Disk:
    """Intercepts writes below some directories, counts those that can need space, and can be full.

    Counted are: opening a file to write, each write that reaches the system, fsync, rename, mkdir, and growing a file
    by truncation. A write that fails writes half of its bytes first, as on a real disk.

    Args:
        roots: Directories on the disk.
    """

    def __init__(self, *roots: Path) -> None:
        self.roots = [os.path.abspath(root) for root in roots]
        self.passed: list[tuple[str, str]] = []
        self.full_at = 0
        self.to_stay = False
        self.names: dict[int, str] = {}

    def watches(self, path: Any) -> bool:
        """Return True for a path on the disk."""
        if not isinstance(path, (str, os.PathLike)):
            return False
        whole = os.path.abspath(path)
        return any(whole == root or whole.startswith(root + os.sep) for root in self.roots)

    def refuses(self, kind: str, path: Any) -> bool:
        """Count an operation that needs space; return True if there is none."""
        self.passed.append((kind, os.path.basename(os.path.abspath(path))))
        number = len(self.passed)
        return number == self.full_at or (self.to_stay and 0 < self.full_at < number)

    def need(self, kind: str, path: Any) -> None:
        """Count an operation that needs space; raise if there is none."""
        if self.refuses(kind, path):
            raise no_space(path)

    @contextmanager
    def mounted(self, *, full_at: int = 0, to_stay: bool = False) -> Iterator[None]:
        """Intercept every write below the directories.

        Args:
            full_at: The number of the write that fails, from 1; 0 for none.
            to_stay: True if all later writes fail too.
        """
        self.passed, self.full_at, self.to_stay = [], full_at, to_stay
        with _doors(self):
            yield


def no_space(path: Any) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _doors(disk: Disk) -> AbstractContextManager[Any]:
    """Patch every function by which a Python program writes."""
    opened, made_fd = io.open, os.open

    class Raw(io.FileIO):
        short = False

        def write(self, data: Any) -> int:
            if not self.short and not disk.refuses("write", self.name):
                return super().write(data)
            view = memoryview(data).cast("B")
            if self.short or len(view) < 2:
                self.short = False
                raise no_space(self.name)
            self.short = True
            return super().write(view[: len(view) // 2])

        def truncate(self, size: int | None = None) -> int:
            if size is not None and size > os.fstat(self.fileno()).st_size:
                disk.need("grow", self.name)
            return super().truncate(size)

    def open_file(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+") or not disk.watches(file):
            return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
        disk.need("open", file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        disk.names[raw.fileno()] = str(file)
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)  # type: ignore[arg-type]
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def open_fd(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT and disk.watches(path):
            disk.need("open", path)
        fd = made_fd(path, flags, *more, **named)
        disk.names[fd] = str(path)
        return fd

    def to_path(kind: str, place: int) -> Any:
        plain = getattr(os, kind)

        def needing(*given: Any, **named: Any) -> Any:
            if disk.watches(given[place]) and not (kind == "mkdir" and os.path.isdir(given[place])):
                disk.need(kind, given[place])
            return plain(*given, **named)

        return mock.patch.object(os, kind, needing)

    def to_file(kind: str) -> Any:
        plain = getattr(os, kind)

        def needing(fd: Any, *given: Any) -> Any:
            number = fd if isinstance(fd, int) else fd.fileno()
            path = disk.names.get(number, "")
            grows = kind != "ftruncate" or given[0] > os.fstat(number).st_size
            if grows and path and disk.watches(path):
                disk.need(kind, path)
            return plain(fd, *given)

        return mock.patch.object(os, kind, needing)

    patches = [
        mock.patch.object(io, "open", open_file),
        mock.patch.object(builtins, "open", open_file),
        mock.patch.object(os, "open", open_fd),
        *(to_path(kind, place) for kind, place in (("mkdir", 0), ("rename", 1), ("replace", 1))),
        *(to_file(kind) for kind in ("fsync", "ftruncate", "posix_fallocate") if hasattr(os, kind)),
    ]
    doors = ExitStack()
    for patch in patches:
        doors.enter_context(patch)
    return doors
