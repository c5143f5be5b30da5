"""Random data: vectors, pairs of vectors, images or tokens in three classes, in memory or fetched one by one."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from tuneforge.sklearn import data_from_arrays
from tuneforge.testing.fuzzer.blocks import WIDTH

INPUTS = ("vectors", "pairs", "images", "tokens")
SOURCES = ("arrays", "tensor-dataset", "dataset", "torch-random", "numpy-random", "python-random")
"""Where samples come from; the last three add random numbers whenever a sample is fetched."""

NUM_CLASSES = 3
_DRAWS = {
    "torch-random": lambda: float(torch.rand(())),
    "numpy-random": lambda: float(np.random.rand()),
    "python-random": random.random,
}


class FetchedSamples(Dataset[Any]):
    """Pairs of inputs and target, of which floats are shifted by a random number at each fetch, if there is one.

    Args:
        inputs: (n, ...), or a mapping of such tensors.
        targets: (n,).
        source: One of `SOURCES`.
    """

    def __init__(self, inputs: Any, targets: Tensor, source: str) -> None:
        self._inputs, self._targets, self._draw = inputs, targets, _DRAWS.get(source, lambda: 0.0)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        shift = 0.3 * self._draw()
        if isinstance(self._inputs, dict):
            return {name: _shift(each[index], shift) for name, each in self._inputs.items()}, self._targets[index]
        return _shift(self._inputs[index], shift), self._targets[index]


def build_data(
    inputs: str, source: str, *, num_train: int, num_val: int, dtype: torch.dtype, regression: bool, seed: int
) -> Any:
    """Return a data source for `Engine(data=...)`; the same arguments give the same samples."""
    generator = torch.Generator().manual_seed(seed)
    train, val, test = (_draw_samples(inputs, count, dtype, regression, generator) for count in (num_train, num_val, 7))
    given: tuple[Any, Any] = train
    if source == "tensor-dataset" and not isinstance(train[0], dict):
        given = TensorDataset(*train), None
    elif source not in ("arrays", "tensor-dataset"):
        given = FetchedSamples(*train, source), None
    names: dict[str, Any] = {} if regression else {"names": tuple("abc")}
    return data_from_arrays(*given, x_val=val[0], y_val=val[1], x_test=test[0], y_test=test[1], **names)


def _draw_samples(
    inputs: str, count: int, dtype: torch.dtype, regression: bool, generator: torch.Generator
) -> tuple[Any, Tensor]:
    """Return inputs that tell the class, and the classes (count,) or numbers."""
    classes = torch.arange(count) % NUM_CLASSES
    centers = torch.randn(NUM_CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    vectors = (centers[classes] + 0.7 * torch.randn(count, WIDTH, generator=generator)).to(dtype)
    samples: Any = vectors
    if inputs == "pairs":
        samples = {"left": vectors[:, :6].contiguous(), "right": vectors[:, 6:].contiguous()}
    elif inputs == "images":
        samples = vectors[:, :12].reshape(count, 3, 2, 2).repeat(1, 1, 3, 3)
    elif inputs == "tokens":
        samples = torch.randint(0, 18, (count, 5), generator=generator) // NUM_CLASSES * NUM_CLASSES + classes[:, None]
    return samples, vectors[:, 0].clone() if regression else classes


def _shift(values: Tensor, shift: float) -> Tensor:
    return values + shift if values.is_floating_point() else values
