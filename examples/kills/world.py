"""What every tool is given: a network, its data, what to train; and a witness that can kill the process.

Only torch is needed here. The witness hangs on the network and on torch's optimizers, so it sees the same of all tools.

Shapes: b samples in a batch, 9 numbers a sample (its own number, then 8 features), 3 classes.
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
    """What a tool is asked to do.

    Args:
        interval: Optimizer steps between two checkpoints; None: no checkpoints. A tool that saves only between epochs
            saves after each.
        keep: Checkpoints kept.
        phases: The head alone for half of the epochs, then all layers.
    """

    interval: int | None = 5
    keep: int = 2
    phases: bool = False


@dataclass(frozen=True)
class Ended:
    """What a tool has when training is over.

    Args:
        optimizer: What its optimizer remembers.
        log: The steps (or epochs) of its record of metrics, as a reader finds them in its files; None: it keeps none.
    """

    optimizer: Any
    log: list[int] | None


class Tool(Protocol):
    """A tool under test."""

    name: str
    each_step: bool
    """It can save within an epoch."""
    freezes: bool
    """It has a way to train the head first."""
    log: str
    """What its record of metrics has a line for: `step`, `epoch`, or empty where it keeps none."""
    records: tuple[str, ...]
    """Beginnings of the paths of records that each start of a run has anew, and that are no litter."""

    def version(self) -> str:
        """Of the package."""

    def fit(self, net: "Net", folder: Path, job: Job, *, resume: bool) -> Ended:
        """Train as the tool's documentation would; `resume` goes on from what lies in `folder`."""

    def newest(self, folder: Path) -> Path | None:
        """The checkpoint that a resume takes, a file or a folder; None: there is none."""


class Net(nn.Module):
    """(b, 9) -> (b, 3): norms and dropout in a body, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(96, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head = nn.Linear(96, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.head(self.body(inputs[:, 1:]))
        return logits


def network() -> Net:
    """The network with the weights it always begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def samples(count: int = SAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Points around three centres, with each sample's own number before them: (count, 9); and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(count) % 3
    points = centres[classes] + torch.randn(count, 8, generator=generator)
    return torch.cat([torch.arange(count).float()[:, None], points], 1), classes


def train_set() -> TensorDataset:
    """The samples to train on."""
    return TensorDataset(*samples())


def val_set() -> TensorDataset:
    """The samples to validate on."""
    return TensorDataset(*samples(24, seed=2))


def seeded() -> None:
    """What a training script does first, and a resumed one does again."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def digest(value: Any) -> str:
    """A hash of nested plain data and tensors, of every bit of them."""
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
    """When a process dies.

    Args:
        place: `forward`, `backward` and `stepped` of a training step, the `validating` that follows it, the `saving`
            that follows it (after a share of the largest file's bytes), or a `file` operation of that (after a share
            of them).
        step: Of this process, counted from 1.
        share: Of the bytes, or of the file operations.
    """

    place: str
    step: int
    share: float = 0.5

    def at_save(self, every: int) -> "Kill":
        """The same at a step after which the tool saves, where it is about a save."""
        if self.place not in ("saving", "file"):
            return self
        step = min(math.ceil(self.step / every), (STEPS - 1) // every) * every
        return Kill(self.place, step, self.share)


@dataclass
class Witness:
    """Sees every training step of a process, and kills it when the time has come.

    Args:
        net: The network.
        folder: Where the tool writes; file operations elsewhere are nobody's business.
        seen: File that gets the samples of each training step, a line each.
        kill: When to die.
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
        """Take a place on the network, on torch's optimizers and on Python's file operations, for good."""
        self.net.register_forward_pre_hook(self._forward)
        self.net.head.weight.register_hook(self._backward)
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: self._stepped())
        sys.addaudithook(self._operation)

    def _due(self, place: str) -> bool:
        return self.kill is not None and self.kill.place == place and self.kill.step == self.step

    def _forward(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        if not isinstance(args[0], Tensor):
            return  # a tracer's stand-in
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
        """True for something that changes a file or a folder of the run or its temporary folder."""
        if event == "open" and not int(args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
        return any(isinstance(each, (str, os.PathLike)) and str(self.folder.parent) in str(each) for each in args) or (
            len(args) > 1 and isinstance(args[-1], int) and args[-1] >= 0 and event != "open"  # relative to a folder
        )


OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


def die() -> None:
    """As `kill -9` would have it."""
    os.kill(os.getpid(), signal.SIGKILL)


def sizes(folder: Path) -> list[tuple[str, int]]:
    """Every file below a folder, and its bytes."""
    found = []
    for base, _, names in os.walk(folder):
        for name in names:
            path = Path(base, name)
            if path.exists():
                found.append((str(path.relative_to(folder)), path.stat().st_size))
    return sorted(found)
