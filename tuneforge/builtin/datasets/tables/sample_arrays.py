"""Samples that are already in Python: arrays and tensors in memory, or a torch Dataset, item by item.

Shapes: n samples, b in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tuneforge import DataError, Source, TensorTree, map_inputs
from tuneforge.builtin.datasets.tables.target_arrays import to_target_array

_LARGE_DATASET = 10_000  # samples from which reading the answers of a Dataset is worth a note


class ArraySamples(NamedTuple):
    """Samples as they were given, of one split or not divided yet."""

    inputs: TensorTree | Source
    targets: NDArray[Any]
    notes: tuple[str, ...] = ()


def read_samples(x: Any, y: Any, split: str) -> ArraySamples:
    """What was given for a split, as inputs and answers of equal number.

    Raises:
        DataError: Something is missing, empty, of another length, or no array.
    """
    where = "x" if split == "train" else f"x_{split}"
    notes: list[str] = []
    if isinstance(x, DataLoader):
        notes.append(f"{where}: a DataLoader's order and batch size are not used; those of the run are")
        x = x.dataset
    inputs: TensorTree | Source
    if isinstance(x, Dataset) and y is None:
        inputs, answers = _read_dataset(x, where)
        if isinstance(inputs, DatasetSource) and len(inputs) >= _LARGE_DATASET:
            notes.append(f"{where}: every sample was fetched once for its answer; {len(inputs):,} is many")
    elif x is None or y is None or isinstance(x, Dataset):
        raise DataError(
            f"{where} and {targets_argument_name(split)} do not go together",
            fix="give arrays x and y, or a Dataset alone",
        )
    else:
        inputs, answers = _to_tensors(x, where), y
    array = to_target_array(answers, where=targets_argument_name(split))
    count = _count_samples(inputs)
    if count != len(array) or not count:
        raise DataError(
            f"{count} samples and {len(array)} answers", where=where, fix="give one answer a sample, and at least one"
        )
    return ArraySamples(inputs, array, tuple(notes))


def targets_argument_name(split: str) -> str:
    """How messages name the answers of a split."""
    return "y" if split == "train" else f"y_{split}"


def describe_tensors(inputs: TensorTree | Source) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape and type of one sample's tensors, by name."""
    first = torch.zeros(1, dtype=torch.int64)
    sample = inputs.fetch(first) if isinstance(inputs, Source) else map_inputs(inputs, lambda tensor: tensor[:1])
    tensors = dict(sample) if isinstance(sample, Mapping) else {"": sample}
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    return shapes, {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def _read_dataset(dataset: Any, where: str) -> tuple[TensorTree | Source, Any]:
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return _to_tensors(dataset.tensors[0], where), dataset.tensors[1]
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} cannot be asked for a sample by number",
            where=where,
            why="the run decides the order, so that it can be resumed",
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
        raise DataError(f"inputs of different lengths: {lengths}", where=where, fix="give one row a sample in each")
    return tensors


def _require_rows(tensor: Tensor, where: str) -> Tensor:
    if tensor.ndim == 0:
        raise DataError("a single number instead of samples", where=where, fix="give an array with a row a sample")
    return tensor


def _count_samples(inputs: TensorTree | Source) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)


class DatasetSource:
    """A torch Dataset as a source: each sample is fetched when it is asked for.

    Args:
        dataset: Of pairs (input, answer).
        where: What messages name.
    """

    def __init__(self, dataset: Dataset[Any], where: str) -> None:
        self.dataset: Any = dataset
        self.where = where

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: Tensor) -> TensorTree:
        """The inputs of `indices`, int64 (b,), one upon the other (b, ...)."""
        samples = [self._read_input(row) for row in indices.tolist()]
        if isinstance(samples[0], Tensor):
            return self._stack(samples, indices)
        return {name: self._stack([sample[name] for sample in samples], indices) for name in samples[0]}

    def read_targets(self) -> list[Any]:
        """Every answer, each from fetching its sample."""
        found = [self._read_pair(row)[1] for row in range(len(self))]
        return [each.tolist() if isinstance(each, (Tensor, np.ndarray)) else each for each in found]

    def _read_input(self, row: int) -> Any:
        value = self._read_pair(row)[0]
        where = f"{self.where}[{row}]"
        if isinstance(value, Mapping):
            return {name: to_tensor(each, where=where) for name, each in value.items()}
        return to_tensor(value, where=where)

    def _read_pair(self, row: int) -> tuple[Any, Any]:
        item = self.dataset[row]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"the dataset gives {type(item).__name__}",
                where=f"{self.where}[{row}]",
                fix="give pairs (input, answer)",
            )
        return item[0], item[1]

    def _stack(self, samples: list[Tensor], rows: Tensor) -> Tensor:
        for row, sample in zip(rows.tolist(), samples, strict=True):
            if sample.shape != samples[0].shape:
                raise DataError(
                    f"samples of shapes {tuple(samples[0].shape)} and {tuple(sample.shape)}",
                    where=f"{self.where}[{row}]",
                    fix="pad or resize them to one shape in the dataset",
                )
        return torch.stack(samples)


def to_tensor(value: Any, *, where: str) -> Tensor:
    """Numbers as a tensor on the CPU: floats as float32, integers as int64, but uint8 and truth values as they are.

    Raises:
        DataError: It is no array of finite numbers.
    """
    if type(value).__module__.partition(".")[0] == "PIL":
        raise DataError("a picture object", where=where, fix="turn it into a tensor (torchvision.transforms.v2)")
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(_to_numeric(np.asarray(value)))
    except (TypeError, ValueError) as error:
        raise DataError(f"{type(value).__name__} is no array of numbers", where=where, why=str(error)) from None
    if tensor.is_floating_point():
        tensor = tensor.float()
        if not tensor.isfinite().all():
            row = int((~tensor.isfinite()).nonzero()[0, 0]) if tensor.ndim else 0
            raise DataError("an input is NaN or infinite", where=f"{where}[{row}]", fix="fill in or remove such values")
    return tensor if tensor.dtype in (torch.float32, torch.uint8, torch.bool) else tensor.long()


def _to_numeric(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"its type is {array.dtype}; text columns belong in a table (--data table-csv)")
    kept = array.dtype == np.uint8 or array.dtype.kind == "b"
    dtype = array.dtype if kept else np.float32 if array.dtype.kind == "f" else np.int64
    return np.require(array, dtype=dtype, requirements=("C", "W"))  # torch warns of arrays it could not write to
