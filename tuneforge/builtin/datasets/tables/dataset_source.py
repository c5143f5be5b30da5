"""A torch Dataset as a source, whose batches may be made by a function of the user.

Shapes: n samples, b in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tuneforge import DataError, Split, TensorTree
from tuneforge.builtin.datasets.tables.raw_tensors import require_one_input, to_tensor

_READ_BLOCK = 64  # samples that are read at once for their targets
_NUM_CHECKED = 16  # samples that are read again, to find out whether they are random


class DatasetSource:
    """A torch Dataset as a source, whose samples are read on demand.

    Args:
        dataset: Dataset of pairs (input, target).
        where: Name of the argument, for messages.
        collate: Function of the user that makes a batch (inputs, targets) of a list of items; None stacks them.
        float_dtype: The dtype that floats get.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        where: str,
        collate: Callable[[list[Any]], Any] | None = None,
        float_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dataset: Any = dataset
        self.float_dtype = float_dtype
        self.where, self.collate = where, collate
        self.batch_dependent = collate is not None
        self.draws = False
        self.content_hash = ""
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
        rows, items = indices.tolist(), []
        for position, row in enumerate(rows):
            seed_sample(position)
            items.append(self.dataset[row])
        seed_sample(len(rows))
        inputs, targets = self._stack_items(items, rows) if self.collate is None else self._collate(items)
        self._last_targets = [each.tolist() if isinstance(each, (Tensor, np.ndarray)) else each for each in targets]
        if self._targets:
            self._check_targets(rows, self._last_targets)
        return inputs

    def read_targets(self) -> list[Any]:
        """Return the targets of all samples, which reads and hashes each sample once, and a few of them three times.

        Raises:
            DataError: A sample cannot be used, or is random in a way that no seed repeats.
        """
        count = len(self)
        split, found, digest = Split(self, torch.zeros(count)), [], hashlib.sha256()
        for start in range(0, count, _READ_BLOCK):
            inputs = split.fetch(torch.arange(start, min(start + _READ_BLOCK, count)))
            for tensor in [inputs] if isinstance(inputs, Tensor) else inputs.values():
                digest.update(tensor.contiguous().numpy().data)
            found += self._last_targets
        self.content_hash = digest.hexdigest()
        self._targets = found
        rows = torch.arange(0, count, max(1, count // _NUM_CHECKED))
        for row in rows if self.batch_dependent else ():
            split.fetch(row[None])  # a target that depends on the batch is an error
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
                    why="a target is read once, so one that is random, or that collate_fn mixes, cannot be trained on",
                    fix="return the same target for a sample each time; mix samples with --augment",
                )

    def _collate(self, items: list[Any]) -> tuple[TensorTree, Any]:
        """Return inputs and targets of the batch that the function of the user makes."""
        assert self.collate is not None
        batch, where = self.collate(items), f"collate_fn of {self.where}"
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            kind = f"{len(batch)} values" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise DataError(f"collate_fn returns {kind}", where=where, fix="return (inputs, targets)")
        inputs = self._to_input(batch[0], where)
        sizes = {len(batch[1]), *(len(each) for each in (inputs.values() if isinstance(inputs, Mapping) else [inputs]))}
        if sizes != {len(items)}:
            what = f"collate_fn makes {sorted(sizes)} inputs and targets of {len(items)} items"
            raise DataError(what, where=where, fix="return one input and one target per item")
        return inputs, batch[1]

    def _stack_items(self, items: list[Any], rows: list[int]) -> tuple[TensorTree, list[Any]]:
        """Return the stacked inputs and the targets of pairs (input, target)."""
        for row, item in zip(rows, items, strict=True):
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise DataError(
                    f"the dataset returns {type(item).__name__}",
                    where=f"{self.where}[{row}]",
                    fix="return pairs (input, target), where several inputs are a mapping by forward's arguments",
                )
        samples = [self._to_input(item[0], f"{self.where}[{row}]") for row, item in zip(rows, items, strict=True)]
        if isinstance(samples[0], Tensor):
            return self._stack(samples, rows), [item[1] for item in items]
        stacked = {name: self._stack([sample[name] for sample in samples], rows) for name in samples[0]}
        return stacked, [item[1] for item in items]

    def _to_input(self, value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return {name: to_tensor(each, where=where, float_dtype=self.float_dtype) for name, each in value.items()}
        require_one_input(value, where=where)
        return to_tensor(value, where=where, float_dtype=self.float_dtype)

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
