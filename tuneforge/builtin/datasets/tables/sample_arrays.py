"""Samples in memory: arrays, tensors, or a torch Dataset whose items are read on demand.

Shapes: n samples, b in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tuneforge import DataError, Source, Split, TensorTree, map_inputs
from tuneforge.builtin.datasets.tables.raw_tensors import require_one_input, to_tensor
from tuneforge.builtin.datasets.tables.target_arrays import to_target_array

_LARGE_DATASET = 10_000  # samples from which reading all targets is slow enough for a note
_READ_BLOCK = 64  # samples that are read at once for their targets
_NUM_CHECKED = 16  # samples that are read again, to find out whether they are random


class ArraySamples(NamedTuple):
    """Samples of one split, or of all data before it is split."""

    inputs: TensorTree | Source
    targets: NDArray[Any]
    notes: tuple[str, ...] = ()


def read_samples(x: Any, y: Any, split: str) -> ArraySamples:
    """Return the samples of a split, with as many targets as inputs.

    Raises:
        DataError: Inputs or targets are missing, empty, of different lengths, or not arrays.
    """
    where = "x" if split == "train" else f"x_{split}"
    notes: list[str] = []
    if isinstance(x, DataLoader):
        notes.append(f"{where}: the sampler and batch size of the DataLoader are not used")
        x = x.dataset
    inputs: TensorTree | Source
    if isinstance(x, Dataset) and y is None:
        inputs, raw_targets = _read_dataset(x, where)
        if isinstance(inputs, DatasetSource) and len(inputs) >= _LARGE_DATASET:
            notes.append(f"{where}: all {len(inputs):,} samples were read once for their targets")
        if isinstance(inputs, DatasetSource) and inputs.draws:
            notes.append(
                f"{where}: the samples are random; each is drawn anew in each epoch, from (seed, epoch, sample)"
            )
    elif x is None or y is None or isinstance(x, Dataset):
        raise DataError(
            f"{where} and {targets_argument_name(split)} do not match",
            fix="give arrays x and y, or a Dataset alone",
        )
    else:
        inputs, raw_targets = _to_tensors(x, where), y
    array = to_target_array(raw_targets, where=targets_argument_name(split))
    count = _count_samples(inputs)
    if count != len(array) or not count:
        raise DataError(
            f"{count} samples and {len(array)} targets", where=where, fix="give one target per sample, and at least one"
        )
    return ArraySamples(inputs, array, tuple(notes))


def targets_argument_name(split: str) -> str:
    """Return the name of the targets argument of a split, for messages."""
    return "y" if split == "train" else f"y_{split}"


def describe_tensors(inputs: TensorTree | Source) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return shape and dtype of the tensors of a sample, by name."""
    first = torch.zeros(1, dtype=torch.int64)
    sample = inputs.fetch(first) if isinstance(inputs, Source) else map_inputs(inputs, lambda tensor: tensor[:1])
    tensors = dict(sample) if isinstance(sample, Mapping) else {"": sample}
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    return shapes, {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def _read_dataset(dataset: Any, where: str) -> tuple[TensorTree | Source, Any]:
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2:
        return _to_tensors(dataset.tensors[0], where), dataset.tensors[1]
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no access by index",
            where=where,
            why="the run chooses the order, so that it can be resumed",
            fix="give a Dataset with __len__ and __getitem__",
        )
    source = DatasetSource(dataset, where)
    return source, source.read_targets()


def _to_tensors(x: Any, where: str) -> TensorTree:
    if not isinstance(x, Mapping):
        return _require_rows(to_tensor(x, where=where), where)
    tensors = {
        str(name): _require_rows(to_tensor(value, where=f"{where}['{name}']"), where) for name, value in x.items()
    }
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"inputs of different lengths: {lengths}", where=where, fix="give one row per sample in each")
    return tensors


def _require_rows(tensor: Tensor, where: str) -> Tensor:
    if tensor.ndim == 0:
        raise DataError("a single number instead of samples", where=where, fix="give an array with a row per sample")
    return tensor


def _count_samples(inputs: TensorTree | Source) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


class DatasetSource:
    """A torch Dataset as a source, whose samples are read on demand.

    Args:
        dataset: Dataset of pairs (input, target).
        where: Name of the argument, for messages.
    """

    def __init__(self, dataset: Dataset[Any], where: str) -> None:
        self.dataset: Any = dataset
        self.where = where
        self.draws = False
        self._targets: list[Any] = []
        self._last_targets: list[Any] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: Tensor) -> TensorTree:
        """Return the stacked inputs (b, ...) of `indices`, int64 (b,), with whatever the generators draw now."""
        return self.fetch_seeded(indices, lambda position: None)

    def fetch_seeded(self, indices: Tensor, seed_sample: Callable[[int], None]) -> TensorTree:
        """Return the stacked inputs (b, ...) of `indices`, each read after its seed was set.

        Raises:
            DataError: Samples do not fit together, or a target is not the one that was read first.
        """
        rows, samples, targets = indices.tolist(), [], []
        for position, row in enumerate(rows):
            seed_sample(position)
            value, target = self._read_pair(row)
            samples.append(self._to_input(value, row))
            targets.append(target.tolist() if isinstance(target, (Tensor, np.ndarray)) else target)
        self._last_targets = targets
        if self._targets:
            self._check_targets(rows, targets)
        if isinstance(samples[0], Tensor):
            return self._stack(samples, rows)
        return {name: self._stack([sample[name] for sample in samples], rows) for name in samples[0]}

    def read_targets(self) -> list[Any]:
        """Return the targets of all samples, which reads each sample once, and a few of them three times.

        Raises:
            DataError: A sample cannot be used, or is random in a way that no seed repeats.
        """
        count = len(self)
        split, found = Split(self, torch.zeros(count)), []
        for start in range(0, count, _READ_BLOCK):
            split.fetch(torch.arange(start, min(start + _READ_BLOCK, count)))
            found += self._last_targets
        self._targets = found
        rows = torch.arange(0, count, max(1, count // _NUM_CHECKED))
        first, again, other = split.fetch(rows), split.fetch(rows), split.fetch(rows, key=1)
        if not _equal_inputs(first, again):
            raise DataError(
                "the dataset draws random numbers that no seed repeats",
                where=self.where,
                why="the same samples were read twice with equal seeds of random, numpy.random and torch, and differ",
                fix="draw from these three, or from a generator that is an attribute of the dataset; not from "
                "numpy.random.default_rng() in __getitem__, from random.SystemRandom or from a clock",
            )
        self.draws = not _equal_inputs(first, other)
        return found

    def _check_targets(self, rows: list[int], targets: list[Any]) -> None:
        for row, target in zip(rows, targets, strict=True):
            if repr(target) != repr(self._targets[row]):
                raise DataError(
                    f"the dataset returns the target {target!r:.60} and returned {self._targets[row]!r:.60} before",
                    where=f"{self.where}[{row}]",
                    why="a target is read once, so a random one cannot be trained on",
                    fix="return the same target for a sample each time; mix samples and targets with --augment",
                )

    def _to_input(self, value: Any, row: int) -> Any:
        where = f"{self.where}[{row}]"
        if isinstance(value, Mapping):
            return {name: to_tensor(each, where=where) for name, each in value.items()}
        require_one_input(value, where=where)
        return to_tensor(value, where=where)

    def _read_pair(self, row: int) -> tuple[Any, Any]:
        item = self.dataset[row]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"the dataset returns {type(item).__name__}",
                where=f"{self.where}[{row}]",
                fix="return pairs (input, target); several inputs are a mapping by the names of forward's arguments",
            )
        return item[0], item[1]

    def _stack(self, samples: list[Tensor], rows: list[int]) -> Tensor:
        for row, sample in zip(rows, samples, strict=True):
            if sample.shape != samples[0].shape:
                raise DataError(
                    f"samples of shapes {tuple(samples[0].shape)} and {tuple(sample.shape)}",
                    where=f"{self.where}[{row}]",
                    fix="pad or resize them to one shape in the dataset",
                )
        return torch.stack(samples)


def _equal_inputs(first: TensorTree, second: TensorTree) -> bool:
    one, other = ({"": each} if isinstance(each, Tensor) else each for each in (first, second))
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())
