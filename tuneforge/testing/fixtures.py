"""Data and model of the conformance kit: Gaussian blobs, and a network with every layer that is hard to freeze.

Shapes: b samples per batch, 8 features, 3 classes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tuneforge import Data, LayerGroup, Model, Split
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets

CLASSES = ("a", "b", "c")
PRETRAINED_LABELS = ("a", "b", "z")
"""Labels of the pretrained head; the row of the class `c` is randomly initialized."""

PREFIXES_BY_GROUP = {"stem": ("stem",), "twins": ("twins",), "body": ("body", "spare"), "head": ("head",)}
ZERO_BIASES = ("twins.one.bias", "twins.two.bias")


class ParallelLinears(nn.Module):
    """Two parallel linear layers whose biases are both zero: (b, n) -> (b, m)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        nn.init.zeros_(self.one.bias)
        nn.init.zeros_(self.two.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both branches."""
        return torch.tanh(self.one(inputs)) + torch.tanh(self.two(inputs))


class SmallNetwork(nn.Module):
    """A network (b, 8) -> (b, 3) with the layers that known issues are about.

    It has norms with and without parameters, one of them at the input; dropout in every block; two equal biases; a
    weight that two layers share; a layer that never gets a gradient (`spare`); and a stem that is worth caching.

    Args:
        batch_statistics: True if the last norm of the body tracks no statistics and always uses those of the batch.
        reversed_registration: Register the blocks in the opposite order; names and values stay the same.
    """

    def __init__(self, *, batch_statistics: bool = False, reversed_registration: bool = False) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(8, affine=False), nn.BatchNorm1d(64), nn.BatchNorm1d(16, affine=False)]
        shared = nn.Linear(16, 16)
        again = nn.Linear(16, 16)
        again.weight = shared.weight
        last = nn.BatchNorm1d(16, track_running_stats=not batch_statistics)
        blocks = {
            "stem": nn.Sequential(norms[0], nn.Linear(8, 64), norms[1], nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64)),
            "twins": ParallelLinears(64, 16),
            "body": nn.Sequential(shared, norms[2], nn.ReLU(), nn.Dropout(0.2), again, last, nn.Dropout(0.2)),
            "spare": nn.Linear(16, 3),
            "head": nn.Linear(16, 3),
        }
        for name in reversed(blocks) if reversed_registration else blocks:
            self.add_module(name, blocks[name])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits."""
        features: Tensor = self.get_submodule("body")(self.get_submodule("twins")(self.get_submodule("stem")(inputs)))
        logits: Tensor = self.get_submodule("head")(features)
        return logits


def make_model(*, batch_statistics: bool = False, reversed_registration: bool = False) -> Model:
    """Return a new model with the pretrained weights, which are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = SmallNetwork(batch_statistics=batch_statistics, reversed_registration=reversed_registration)
        _update_batchnorm_statistics(module, (torch.randn(64, 8) * 2 + 1 for _ in range(3)))
    groups = [LayerGroup(name, prefixes) for name, prefixes in PREFIXES_BY_GROUP.items()]
    return Model(module, groups=groups, head="head", labels=PRETRAINED_LABELS, pretrained_labels=PRETRAINED_LABELS)


def _update_batchnorm_statistics(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Update the statistics of the norms with other data than the run's, so that a later update shows."""
    module.train()
    with torch.no_grad():
        for batch in batches:
            module(batch)


def make_blobs(count: int, *, seed: int) -> Split:
    """Return points (count, 8) around three centers, with their classes."""
    centers = torch.randn(len(CLASSES), 8, generator=torch.Generator().manual_seed(0)) * 2
    classes = torch.arange(count) % len(CLASSES)
    return Split(centers[classes] + torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), classes)


def make_data() -> Data:
    """Return 48 training samples, a third of them in the sample group `old`, 24 validation and 12 test samples."""
    return Data(
        train=make_blobs(48, seed=1),
        val=make_blobs(24, seed=2),
        test=make_blobs(12, seed=3),
        inputs=TensorInputs(),
        targets=ClassTargets(names=CLASSES),
        sample_groups={"old": torch.arange(0, 48, 3)},
    )
