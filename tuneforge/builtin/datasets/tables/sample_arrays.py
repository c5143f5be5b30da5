"""Samples in memory: arrays, tensors, or a torch Dataset whose items are read on demand.

Shapes: n samples, b in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from tuneforge import DataError, Source, TensorTree, map_inputs
from tuneforge.builtin.datasets.tables.dataset_source import DatasetSource
from tuneforge.builtin.datasets.tables.loader_parts import LoaderParts
from tuneforge.builtin.datasets.tables.raw_tensors import to_tensor
from tuneforge.builtin.datasets.tables.target_arrays import to_target_array

_NUM_COMPARED = 64  # samples whose shapes are compared
_MAX_SCALE, _MAX_SCALE_RATIO = 1000.0, 100  # of the largest absolute values of features
_LARGE_DATASET = 10_000  # samples from which reading all targets is slow enough for a note


class ArraySamples(NamedTuple):
    """Samples of one split, or of all data before it is split."""

    inputs: TensorTree | Source
    targets: NDArray[Any]
    notes: tuple[str, ...] = ()
    loader: LoaderParts | None = None

    @property
    def collated(self) -> bool:
        """True if a function of the user makes the batches, so that a sample may depend on others of its batch."""
        return self.loader is not None and self.loader.collate is not None

    def dataset_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of the dataset of `rows` of these samples, int64."""
        return rows if self.loader is None or self.loader.rows is None else self.loader.rows[rows]


def read_samples(x: Any, y: Any, split: str, float_dtype: torch.dtype = torch.float32) -> ArraySamples:
    """Return the samples of a split, with as many targets as inputs; floats get `float_dtype`.

    Raises:
        DataError: Inputs or targets are missing, empty, of different lengths, or not arrays.
    """
    where = "x" if split == "train" else f"x_{split}"
    notes: list[str] = []
    loader = None
    if isinstance(x, DataLoader):
        loader = LoaderParts.read(x, where, evaluates=split != "train")
        notes += loader.notes
        x = loader.dataset
    inputs: TensorTree | Source
    if isinstance(x, Dataset) and y is None:
        inputs, raw_targets = _read_dataset(x, where, loader, float_dtype)
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
        inputs, raw_targets = _to_tensors(x, where, float_dtype), y
    array = to_target_array(raw_targets, where=targets_argument_name(split))
    count = _count_samples(inputs)
    if count != len(array) or not count:
        raise DataError(
            f"{count} samples and {len(array)} targets", where=where, fix="give one target per sample, and at least one"
        )
    return ArraySamples(inputs, array, tuple(notes), loader)


def targets_argument_name(split: str) -> str:
    """Return the name of the targets argument of a split, for messages."""
    return "y" if split == "train" else f"y_{split}"


def describe_tensors(inputs: TensorTree | Source) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return shape and dtype of the tensors of a sample, by name."""
    first = torch.zeros(1, dtype=torch.int64)
    sample = inputs.fetch(first) if isinstance(inputs, Source) else map_inputs(inputs, lambda tensor: tensor[:1])
    tensors = dict(sample) if isinstance(sample, Mapping) else {"": sample}
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    if isinstance(inputs, DatasetSource) and inputs.batch_dependent:
        shapes = {name: _common_shape(inputs, name) for name in tensors}
    return shapes, {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}


def _common_shape(source: DatasetSource, name: str) -> tuple[int, ...]:
    """Return the shape of samples that a function of the user makes; -1 for a size that differs between samples."""
    count = len(source)
    fetched = [source.fetch(torch.tensor([row])) for row in range(0, count, max(1, count // _NUM_COMPARED))]
    shapes = [(each[name] if isinstance(each, Mapping) else each).shape[1:] for each in fetched]
    return tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))


def find_unlike_scales(inputs: TensorTree | Source, rows: Tensor) -> list[str]:
    """Return a note if the features of rows (n, f) of floats are of unlike scales, or far above 1."""
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or not inputs.is_floating_point():
        return []
    largest = inputs[rows].abs().amax(0)
    features = largest.nonzero().flatten()
    if not len(features):
        return []
    high, low = (int(features[each]) for each in (largest[features].argmax(), largest[features].argmin()))
    if largest[high] <= min(_MAX_SCALE, _MAX_SCALE_RATIO * float(largest[low])):
        return []
    return [
        f"x has features of unlike or large scales, which train badly: feature {high} is up to {largest[high]:.3g}, "
        f"feature {low} up to {largest[low]:.3g}; "
        "tuneforge.sklearn.data_from_arrays(x, y, standardize=True) standardizes them"
    ]


def _read_dataset(
    dataset: Any, where: str, loader: LoaderParts | None, float_dtype: torch.dtype
) -> tuple[TensorTree | Source, Any]:
    rows, collate = (None, None) if loader is None else (loader.rows, loader.collate)
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2 and collate is None:
        inputs, targets = dataset.tensors if rows is None else dataset[rows]
        return _to_tensors(inputs, where, float_dtype), targets
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no access by index",
            where=where,
            why="the run chooses the order, so that it can be resumed",
            fix="give a Dataset with __len__ and __getitem__",
        )
    indexed = dataset if rows is None else Subset(dataset, rows.tolist())
    source = DatasetSource(indexed, where, collate, float_dtype)
    return source, source.read_targets()


def _to_tensors(x: Any, where: str, float_dtype: torch.dtype) -> TensorTree:
    if not isinstance(x, Mapping):
        return _require_rows(to_tensor(x, where=where, float_dtype=float_dtype), where)
    tensors = {
        str(name): _require_rows(to_tensor(value, where=f"{where}['{name}']", float_dtype=float_dtype), where)
        for name, value in x.items()
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
