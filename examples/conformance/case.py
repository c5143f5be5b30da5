"""The job of every library: the head trains first, then all layers; and an observer of it.

Only torch is needed. The observer uses hooks of the network itself, so it sees the same of every library.

Shapes: b samples in a batch, 8 features per sample, 3 classes.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH, SAMPLES = 16, 48
STEPS_AN_EPOCH = SAMPLES // BATCH


class Fails(Exception):  # noqa: N818 - it reads as the row's verdict
    """The library has the issue; the message says how it showed."""


class PassesWithNote(Exception):  # noqa: N818 - it reads as the row's verdict
    """The library passes, with a note."""


class NotThereError(Exception):
    """The library has no such feature, so the row does not apply."""


class KilledError(BaseException):
    """Simulates SIGKILL, so no library may catch it."""


@dataclass(frozen=True)
class Plan:
    """What a library is to train.

    Args:
        phases: What trains in each epoch, `"head"` or `"all"`.
        optimizer: `"adamw"` or `"sgd"` (momentum 0.9).
        decay: Weight decay.
        schedule: The library's name of a learning-rate schedule; None: constant.
        shuffle: Draw samples in random order.
        compiled: Compile the network.
        apart: Give each block of the backbone its own learning rate when it is unfrozen.
    """

    phases: tuple[str, ...] = ("head", "all", "all")
    optimizer: str = "adamw"
    decay: float = 0.0
    schedule: str | None = None
    shuffle: bool = False
    compiled: bool = False
    apart: bool = False


class Peer(Protocol):
    """A library under test."""

    name: str

    def version(self) -> str:
        """Return the version of the package."""

    def schedules(self) -> tuple[str, ...]:
        """Return the names of the schedules of row 5."""

    def fit(self, net: "Net", plan: Plan, folder: Path, *, resume: bool = False) -> None:
        """Train as the library's documentation shows; checkpoints go into `folder`, where `resume` finds them."""

    def ranks(self, folder: Path) -> None:
        """Row 10: an unfreezing on two ranks. Raises `Fails`."""

    def rates(self, net: "Net", folder: Path) -> None:
        """Row 11: run the learning-rate finder."""

    def pattern(self, net: "Net", folder: Path) -> str:
        """Row 12: freeze or unfreeze by a pattern that matches nothing; return the message."""

    def reasons(self, net: "Net", folder: Path, *, asked: bool = False) -> None:
        """Row 13: train until early stopping ends a phase; output and log are examined.

        With `asked` the library is told to log the reason, if it has an option for that.
        """


class Twins(nn.Module):
    """Two layers side by side with equal (zero) biases: (b, n) -> (b, m)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        nn.init.zeros_(self.one.bias)
        nn.init.zeros_(self.two.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both outputs."""
        return torch.tanh(self.one(inputs)) + torch.tanh(self.two(inputs))


class Net(nn.Module):
    """(b, 8) -> (b, 3): a backbone with BatchNorm, dropout and two equal biases, and a head.

    Args:
        dropout: Dropout probability.
        backwards: Register the twins in the opposite order; names and values stay the same.
    """

    def __init__(self, dropout: float = 0.0, *, backwards: bool = False) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        twins = Twins(16, 16)
        after = nn.Sequential(nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout))
        if backwards:
            first, second = twins.one, twins.two
            del twins.one, twins.two
            twins.two, twins.one = second, first
        self.backbone = nn.Sequential()
        for name, block in {"stem": stem, "twins": twins, "after": after}.items():
            self.backbone.add_module(name, block)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.backbone(inputs))
        return logits


def network(dropout: float = 0.0, *, backwards: bool = False) -> Net:
    """Return the network with its initial weights and BatchNorm statistics of other data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net(dropout, backwards=backwards).train()
        with torch.no_grad():
            for _ in range(3):
                net(torch.randn(64, 8) * 2 + 1)
    return net


def samples(count: int = SAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return points (count, 8) around three centers, and their classes; the first feature of each is unique."""
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 2
    classes = torch.arange(count) % 3
    return centres[classes] + torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), classes


def loaders(plan: Plan) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return torch's loaders for training and validation."""
    train, val = TensorDataset(*samples()), TensorDataset(*samples(24, seed=2))
    return DataLoader(train, BATCH, shuffle=plan.shuffle), DataLoader(val, BATCH)


def optimizer_of(plan: Plan, parameters: Any) -> torch.optim.Optimizer:
    """Return the plan's optimizer, with learning rate 0.01."""
    if plan.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=plan.decay)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=plan.decay)


def seeded() -> None:
    """Set the seeds, as a training script does at its start, also when it resumes."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Return copies of every parameter and buffer by name."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not bit-identical."""
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


@dataclass
class Witness:
    """Records what the network's own hooks see.

    Args:
        phases: What trains in each epoch.
        kill_at: Training steps after which the process is "killed".
        starts: Every tensor at the first training step of each epoch.
        batches: The samples of each training step, by their first number.
        faults: Faults in the forward passes of frozen phases.
        begun: Training steps started before this observer was added.
    """

    phases: tuple[str, ...]
    kill_at: int | None = None
    starts: list[dict[str, Tensor]] = field(default_factory=list)
    batches: list[tuple[float, ...]] = field(default_factory=list)
    faults: set[str] = field(default_factory=set)

    def step(self, net: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Record a forward pass of the network before it runs; those of validation have no gradients."""
        if not torch.is_grad_enabled() or (not net.training and not self._frozen()):
            return
        if self.kill_at == len(self.batches):
            raise KilledError
        if len(self.batches) % STEPS_AN_EPOCH == 0:
            self.starts.append(state_of(net))
        self.batches.append(tuple(args[0][:, 0].tolist()))

    def _frozen(self) -> bool:
        epoch = max(0, len(self.batches) - 1) // STEPS_AN_EPOCH
        return epoch < len(self.phases) and self.phases[epoch] == "head"

    def dropout(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Check a dropout layer of the backbone."""
        if torch.is_grad_enabled() and self._frozen() and not torch.equal(args[0], output):
            self.faults.add("dropout is on in the frozen backbone")

    def norm(self, module: nn.BatchNorm1d, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Check a BatchNorm layer of the backbone."""
        if torch.is_grad_enabled() and self._frozen():
            mean, variance = module.running_mean, module.running_var
            expected = F.batch_norm(args[0], mean, variance, module.weight, module.bias, eps=module.eps)
            if not torch.allclose(expected, output, atol=1e-4):
                self.faults.add("frozen BatchNorm normalizes with batch statistics in training")


@contextmanager
def watched(net: Net, plan: Plan, *, kill_at: int | None = None) -> Iterator[Witness]:
    """Add an observer to a network."""
    witness = Witness(plan.phases, kill_at)
    handles = [net.register_forward_pre_hook(witness.step)]
    for module in net.backbone.modules():
        hooks: dict[type, Callable[..., Any]] = {nn.Dropout: witness.dropout, nn.BatchNorm1d: witness.norm}
        if type(module) in hooks:
            handles.append(module.register_forward_hook(hooks[type(module)]))
    try:
        yield witness
    finally:
        for handle in handles:
            handle.remove()
