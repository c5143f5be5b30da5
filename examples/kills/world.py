"""The job of every library: a network, its data, what to train; and an observer that can kill the process.

Only torch is needed. The observer uses hooks of the network and of torch's optimizers, so it sees the same of every
library.

Shapes: b samples in a batch, 9 numbers per sample (its index, then 8 features), 3 classes.
"""

import hashlib
import json
import math
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

BATCH, SAMPLES, EPOCHS = 8, 96, 4
STEPS_AN_EPOCH = SAMPLES // BATCH
STEPS = EPOCHS * STEPS_AN_EPOCH
LR, DECAY = 0.01, 0.05


@dataclass(frozen=True)
class Job:
    """What a library is to train.

    Args:
        interval: Optimizer steps between two checkpoints; None: no checkpoints. A library that saves only between
            epochs saves after each.
        keep: Checkpoints kept.
        phases: The head alone for half of the epochs, then all layers.
    """

    interval: int | None = 5
    keep: int = 2
    phases: bool = False


@dataclass(frozen=True)
class Ended:
    """What a library has at the end of training.

    Args:
        optimizer: The optimizer's state.
        log: The steps (or epochs) of its record of metrics, as a reader finds them in its files; None: it keeps none.
    """

    optimizer: Any
    log: list[int] | None


class Tool(Protocol):
    """A library under test."""

    name: str
    each_step: bool
    """Whether it can save within an epoch."""
    freezes: bool
    """Whether it can train the head first."""
    log: str
    """What a line of its metrics is for: `step`, `epoch`, or empty if it keeps none."""
    records: tuple[str, ...]
    """Prefixes of log files that each start writes anew, which are not counted as leftover."""

    def version(self) -> str:
        """Return the version of the package."""

    def fit(self, net: "Net", folder: Path, job: Job, *, resume: bool) -> Ended:
        """Train as the library's documentation shows; `resume` continues from `folder`."""

    def newest(self, folder: Path) -> Path | None:
        """Return the checkpoint that a resume uses, a file or a folder; None: there is none."""


class Net(nn.Module):
    """(b, 9) -> (b, 3): a body with BatchNorm and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head = nn.Linear(96, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.body(inputs[:, 1:]))
        return logits


def network() -> Net:
    """Return the network with its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def samples(count: int = SAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return points around three centers, each after its index: (count, 9); and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(count) % 3
    points = centres[classes] + torch.randn(count, 8, generator=generator)
    return torch.cat([torch.arange(count).float()[:, None], points], 1), classes


def train_set() -> TensorDataset:
    """Return the training samples."""
    return TensorDataset(*samples())


def val_set() -> TensorDataset:
    """Return the validation samples."""
    return TensorDataset(*samples(24, seed=2))


def seeded() -> None:
    """Set the seeds, as a training script does at its start, also when it resumes."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def digest(value: Any) -> str:
    """Return a hash of nested plain data and tensors, of all their bits."""
    found = hashlib.sha256()
    _feed(found, value)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(str(key).encode())
            _feed(found, value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            _feed(found, each)
    else:
        found.update(repr(value).encode())


@dataclass(frozen=True)
class Kill:
    """When a process is killed.

    Args:
        place: `forward`, `backward` and `stepped` of a training step, the `validating` that follows it, the `saving`
            that follows it (after a fraction of the largest file's bytes), or a `file` operation of that (after a
            fraction of them).
        step: Step of this process, counted from 1.
        share: Fraction of the bytes, or of the file operations.
    """

    place: str
    step: int
    share: float = 0.5

    def at_save(self, every: int) -> "Kill":
        """Return the same kill at a step after which the library saves, if it is about a save."""
        if self.place not in ("saving", "file"):
            return self
        step = min(math.ceil(self.step / every), (STEPS - 1) // every) * every
        return Kill(self.place, step, self.share)


@dataclass
class Witness:
    """Observes every training step of a process, and kills it at the given point.

    Args:
        net: The network.
        folder: Where the library writes; other file operations are ignored.
        seen: File for the samples of each training step, one line per step.
        kill: When to kill.
        largest: Bytes of the largest file of a checkpoint.
        operations: File operations of a save.
        pause: A file to wait for at step `pause_at`.
    """

    net: Net
    folder: Path
    seen: Path
    kill: Kill | None = None
    largest: int = 0
    operations: int = 0
    pause: Path | None = None
    pause_at: int = 20
    step: int = 0
    armed: bool = False
    counted: dict[int, int] = field(default_factory=dict)
    gaps: dict[int, float] = field(default_factory=dict)
    """Seconds from each optimizer step to the next training step, or validation."""
    rests: dict[int, float] = field(default_factory=dict)
    """Seconds from the last validation to the next training step."""
    _since: float = 0.0
    _validated: float = 0.0

    def watch(self) -> None:
        """Add hooks to the network, to torch's optimizers and to Python's file operations; they stay."""
        self.net.register_forward_pre_hook(self._forward)
        self.net.head.weight.register_hook(self._backward)
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: self._stepped())
        sys.addaudithook(self._operation)

    def _due(self, place: str) -> bool:
        return self.kill is not None and self.kill.place == place and self.kill.step == self.step

    def _forward(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(args[0], Tensor):
            return  # a proxy of torch.fx
        self.gaps.setdefault(self.step, time.perf_counter() - self._since)
        if not (torch.is_grad_enabled() and self.net.head.training):
            if self._due("validating"):
                die()
            self._validated = time.perf_counter()
            return
        self.armed = False
        self.rests.setdefault(self.step, time.perf_counter() - self._validated)
        self.largest = max([self.largest, *(size for _, size in sizes(self.folder))])
        self.step += 1
        with self.seen.open("a") as file:
            file.write(json.dumps([int(number) for number in args[0][:, 0]]) + "\n")
        if self._due("forward"):
            die()
        while self.pause is not None and self.step == self.pause_at and not self.pause.exists():
            time.sleep(0.01)

    def _backward(self, gradient: Tensor) -> None:
        if self._due("backward"):
            die()

    def _stepped(self) -> None:
        if self._due("stepped"):
            die()
        if self._due("saving"):
            assert self.kill is not None
            limit = int(self.largest * self.kill.share)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # who writes past it is killed by the kernel
        self.armed = True
        self.counted[self.step] = 0
        self._since = time.perf_counter()

    def _operation(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed or event not in OPERATIONS or not self._ours(event, args):
            return
        self.counted[self.step] += 1
        if self._due("file"):
            assert self.kill is not None
            if self.counted[self.step] >= max(1, math.ceil(self.operations * self.kill.share)):
                die()

    def _ours(self, event: str, args: tuple[Any, ...]) -> bool:
        """Return whether an event changes a file of the run or of its temporary folder."""
        if event == "open" and not int(args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
        return any(isinstance(each, (str, os.PathLike)) and str(self.folder.parent) in str(each) for each in args) or (
            len(args) > 1 and isinstance(args[-1], int) and args[-1] >= 0 and event != "open"  # relative to a folder
        )


OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def die() -> None:
    """Kill this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def sizes(folder: Path) -> list[tuple[str, int]]:
    """Return every file below a folder with its size in bytes."""
    found = []
    for base, _, names in os.walk(folder):
        for name in names:
            path = Path(base, name)
            if path.exists():
                found.append((str(path.relative_to(folder)), path.stat().st_size))
    return sorted(found)
