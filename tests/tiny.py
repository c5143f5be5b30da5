"""Data and a network that train in milliseconds: three Gaussian blobs, and layers with BatchNorm and dropout."""

from __future__ import annotations

import types

import attrs
import torch
from torch import nn

import tuneforge as tf
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets
from tuneforge.engine.context.distributed import ProcessGroup


class TinyNet(nn.Module):
    """Two blocks with BatchNorm and dropout, then a linear head: (batch, 8) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(inputs)))


def blobs(count: int, *, seed: int) -> tf.Split:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    centers = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 2
    return tf.Split(centers[targets] + torch.randn(count, 8, generator=generator), targets)


def tiny_data() -> tf.Data:
    return tf.Data(
        train=blobs(96, seed=1),
        val=blobs(30, seed=2),
        test=blobs(30, seed=3),
        inputs=TensorInputs(),
        targets=ClassTargets(names=("a", "b", "c")),
    )


def tiny_net(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet()


class Double(nn.Module):
    """Doubles its input; `DoubleHeadInput` inserts it before the head."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * 2


@tf.component(api=1)
class DoubleHeadInput:
    """A callback that inserts a module before the head, without a change of weights."""

    @tf.hookimpl(wrapper=True)
    def model_adapt(self, run: tf.Run):
        model = yield
        head = nn.Sequential(Double(), model.head_module())
        return model.with_head(head, head=f"{model.head}.1")


class StubRun:
    """What a data source reads of a run, for `data_prepare(StubRun)` without an engine."""

    config = types.SimpleNamespace(seed=0, num_workers=0)
    data_seed, restoring, single_split, run_dir = 0, False, False, None
    expected_inputs = None
    float_dtype, process_group = torch.float32, ProcessGroup()


@tf.component(api=1)
class GaussianJitter:
    """An augmentation that adds noise from each sample's own random numbers."""

    per_sample = True

    def augment(self, run: tf.Run, batch: tf.Batch) -> tf.Batch:
        return attrs.evolve(batch, inputs=batch.inputs + 0.1 * batch.rng.normal("shaken", 8))
