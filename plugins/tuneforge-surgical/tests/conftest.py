"""A small network that came with its weights, and the real engine to tune it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

import tuneforge as tf

torch.set_num_threads(1)

CLASSES = ("0", "1", "2")


@attrs.frozen(eq=False)
class Tuned:
    """What one run did: all tensors at each phase's start and at the end, what the phases' rates were, and its result."""

    starts: list[dict[str, Tensor]]
    rates: list[dict[str, float]]
    end: dict[str, Tensor]
    result: tf.Result

    def moved(self, since: int = 0) -> set[str]:
        """Names of the parameters and buffers that differ between a phase's start and the end of the run."""
        return {name for name, tensor in self.starts[since].items() if not torch.equal(tensor, self.end[name])}

    def step_names(self) -> list[str]:
        return [step.name for step, _ in self.result.steps]


class Watch:
    """Notes every tensor and every rate when a phase starts."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, float]] = []

    @tf.hookimpl
    def phase_started(self, run: tf.Run) -> None:
        names = {parameter: name for name, parameter in run.model.parameters().items()}
        groups = run.optimization.groups()
        self.starts.append({name: tensor.clone() for name, tensor in run.model.module.state_dict().items()})
        self.rates.append({names[tensor]: group["peak_lr"] for group in groups for tensor in group["params"]})


def network(seed: int = 0) -> nn.Sequential:
    """Two blocks with BatchNorm and a linear head: (b, 6) -> (b, 3)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential()
        net.add_module("stem", nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()))
        net.add_module("body", nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()))
        net.add_module("head", nn.Linear(16, 3))
    return net


def model(net: nn.Module, known: tuple[str, ...] = CLASSES) -> tf.Model:
    """The network with its head's rows for the classes `known`; a run starts rows of other classes fresh."""
    groups = [tf.Group(name, (name,)) for name in ("stem", "body", "head")]
    labels = known if len(known) == 3 else (*known, *("?" * (3 - len(known))))
    return tf.Model(net, groups=groups, head="head", labels=labels, kept=known)


def points(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Points (n, 6) around the centres of three classes, and their classes (n,)."""
    centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * 2
    classes = torch.arange(count) % 3
    return centres[classes] + torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), classes


@pytest.fixture(name="network")
def network_fixture() -> nn.Sequential:
    """A fresh copy of the network."""
    return network()


@pytest.fixture
def tune(tmp_path: Path) -> Callable[..., Tuned]:
    """Run the engine: `tune(Surgical(epochs=2))`, `tune(strategy, known=("0", "1"))`, `tune(strategy, net=net)`."""
    number = iter(range(1000))

    def run(strategy: Any, *, net: nn.Module | None = None, known: tuple[str, ...] = CLASSES, **given: Any) -> Tuned:
        watch = Watch()
        given = {"data": points(150), "batch_size": 16, "page": False, "extensions": [watch], **given}
        start = model(network() if net is None else net, known)
        result = tf.Engine(strategy=strategy, model=start, out=tmp_path / f"run{next(number)}", **given).run()
        end = {name: tensor.clone() for name, tensor in result.model.module.state_dict().items()}
        return Tuned(watch.starts, watch.rates, end, result)

    return run
