"""A small pretrained network, clusters of points to fine-tune it on, and a recorder of its runs."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

import tuneforge as tf

CLASSES = ("0", "1", "2")


class PhaseRecorder:
    """Records all tensors and their learning rates when a phase starts."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.learning_rates: list[dict[str, float]] = []

    @tf.hookimpl
    def phase_started(self, run: tf.Run) -> None:
        names = {parameter: name for name, parameter in run.model.parameters().items()}
        groups = run.optimization.param_groups()
        self.starts.append(copy_state(run.model.module))
        self.learning_rates.append({names[tensor]: group["peak_lr"] for group in groups for tensor in group["params"]})


@attrs.frozen(eq=False)
class RecordedRun:
    """A run: tensors and learning rates at the start of each phase, tensors at the end, and the result."""

    starts: list[dict[str, Tensor]]
    learning_rates: list[dict[str, float]]
    final_state: dict[str, Tensor]
    result: tf.Result

    def find_changed(self, since: int = 0) -> set[str]:
        """Return the names of parameters and buffers that differ between the start of a phase and the run's end."""
        return {name for name, tensor in self.starts[since].items() if not torch.equal(tensor, self.final_state[name])}

    def step_names(self) -> list[str]:
        return [step.name for step, _ in self.result.strategy_steps]


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def make_network(seed: int = 0) -> nn.Sequential:
    """Return a network of two blocks with BatchNorm and a linear head: (b, 6) -> (b, 3)."""
    net = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net.add_module("stem", nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()))
        net.add_module("body", nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()))
        net.add_module("head", nn.Linear(16, 3))
    return net


def make_model(net: nn.Module, known: tuple[str, ...] = CLASSES) -> tf.Model:
    """Return a model whose head has pretrained rows for the classes `known`; a run initializes the others randomly."""
    groups = [tf.LayerGroup(name, (name,)) for name in ("stem", "body", "head")]
    labels = (*known, *("?" * (3 - len(known))))
    return tf.Model(net, groups=groups, head="head", labels=labels, pretrained_labels=known)


def make_blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points (n, 6) around twelve centers, and their three classes (n,)."""
    centers = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * 2
    cluster = torch.arange(count) % 12
    noise = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return centers[cluster] + noise / 2, cluster % 3
