"""Batches: which rows each one holds, and the samples of those rows, decoded ahead where that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import attrs
import numpy as np
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Batch, Split, TensorTree
from tuneforge.engine.data.sampler import EpochSampler
from tuneforge.engine.data.workers import Workers

_POSITIONS_PER_BLOCK = 2**14  # positions of an order that are asked at once; more cost memory and save no time


def fetch_batches(
    split: Split, indices: Iterator[Tensor], *, workers: Workers | int
) -> Iterator[tuple[Tensor, TensorTree]]:
    """Batches of rows, int64 (b,), with their stored inputs, in the order that `indices` says.

    Args:
        split: Where samples come from.
        indices: Rows of each batch.
        workers: Processes that decode ahead where the split is not in memory; a number starts them for this pass
            alone, and 0 decodes in this process.
    """
    if isinstance(workers, int):
        own = Workers(workers, [split.source])
        try:
            yield from fetch_batches(split, indices, workers=own)
        finally:
            own.close()
    elif split.in_memory or not workers.can_fetch(split.source):
        for chosen in indices:
            yield chosen, split.fetch(chosen)
    else:
        yield from workers.fetch_batches(split.source, indices)


def iter_batches(
    split: Split, indices: Iterator[Tensor], collate: Callable[[Tensor, TensorTree], Batch], *, workers: Workers | int
) -> Iterator[Batch]:
    """What `collate` makes of the rows of each batch and their stored inputs; see `fetch_batches`."""
    return (collate(chosen, stored) for chosen, stored in fetch_batches(split, indices, workers=workers))


@attrs.frozen
class BatchSizes(Sequence[int]):
    """Samples of each batch of an epoch: all equal, then what is left; one sample left over joins the batch before.

    A batch of one has no batch statistics, so a norm could not train on it.

    Args:
        size: Samples of the epoch.
        batch_size: Samples of all batches but the last.
    """

    size: int
    batch_size: int

    def __len__(self) -> int:
        whole, left = divmod(self.size, self.batch_size)
        return whole + (left > 0) - self._merges_remainder(whole, left)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """The size of one batch, or of each batch of a slice."""
        count = len(self)
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(count))]
        at = range(count)[place]
        return self.batch_size if at < count - 1 else self.size - at * self.batch_size

    def _merges_remainder(self, whole: int, left: int) -> bool:
        return left == 1 and whole > 0 and self.batch_size > 1


def batch_sizes(size: int, batch_size: int) -> Sequence[int]:
    """Samples of each batch of an epoch; see `BatchSizes`. No list is held."""
    return BatchSizes(size, batch_size)


def iter_sequential(size: int, batch_size: int) -> Iterator[Tensor]:
    """All rows once, in order, in batches."""
    return (torch.arange(start, min(start + batch_size, size)) for start in range(0, size, batch_size))


def iter_sampled(
    sampler: EpochSampler,
    batch_size: int,
    *,
    start: int = 0,
    span: Callable[[int], tuple[int, int]] = lambda size: (0, size),
) -> Iterator[Tensor]:
    """The rows of an epoch from batch `start` on; positions are asked in blocks, so no list of samples is held.

    Args:
        sampler: Of the epoch.
        batch_size: Samples of a batch.
        start: The first batch.
        span: Which part of a batch of that size is wanted, from and to; all of it by default.
    """
    sizes = BatchSizes(sampler.size, batch_size)
    at_once = max(1, _POSITIONS_PER_BLOCK // batch_size)
    for first in range(start, len(sizes), at_once):
        spans = list(map(span, sizes[first : first + at_once]))
        bases = range(first * batch_size, sampler.size, batch_size)
        positions = [np.arange(base + low, base + high) for base, (low, high) in zip(bases, spans, strict=False)]
        yield from torch.split(sampler.indices_at(np.concatenate(positions)), [high - low for low, high in spans])
