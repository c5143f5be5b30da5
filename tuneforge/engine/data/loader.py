"""Batches of samples: which rows each batch holds, and their stored inputs, decoded ahead by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import attrs
import numpy as np
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Batch, Split, TensorTree
from tuneforge.engine.data.sample_seeds import FIXED_DRAW
from tuneforge.engine.data.sampler import EpochSampler, ListedSampler
from tuneforge.engine.data.workers import Workers

_POSITIONS_PER_BLOCK = 2**14  # positions computed at once; more cost memory and save no time


def fetch_batches(
    split: Split, indices: Iterator[Tensor], *, workers: Workers | int, key: int = FIXED_DRAW
) -> Iterator[tuple[Tensor, TensorTree]]:
    """Yield the rows of each batch, int64 (b,), with their stored inputs, in the order of `indices`.

    Args:
        split: Where samples come from.
        indices: Rows of each batch.
        workers: Processes that decode ahead if the split is not in memory; a number starts them for this pass alone,
            and 0 decodes in this process.
        key: Which draw of random samples to fetch; see `Split.fetch`.
    """
    if isinstance(workers, int):
        workers_of_pass = Workers(workers, [split.source])
        try:
            yield from fetch_batches(split, indices, workers=workers_of_pass, key=key)
        finally:
            workers_of_pass.close()
    elif split.in_memory or not workers.can_fetch(split.source):
        for chosen in indices:
            yield chosen, split.fetch(chosen, key)
    else:
        yield from workers.fetch_batches(split.source, indices, key)


def iter_batches(
    split: Split,
    indices: Iterator[Tensor],
    collate: Callable[[Tensor, TensorTree], Batch],
    *,
    workers: Workers | int,
    key: int = FIXED_DRAW,
) -> Iterator[Batch]:
    """Yield what `collate` makes of the rows of each batch and their stored inputs; see `fetch_batches`."""
    return (collate(chosen, stored) for chosen, stored in fetch_batches(split, indices, workers=workers, key=key))


@attrs.frozen
class BatchSizes(Sequence[int]):
    """The number of samples in each batch of an epoch.

    All batches are equal but for the last one, which holds the remainder. A remainder of a single sample joins the
    batch before, because BatchNorm cannot train on one sample.

    Args:
        size: Samples in the epoch.
        batch_size: Samples in all batches but the last.
    """

    size: int
    batch_size: int

    def __len__(self) -> int:
        num_full, remainder = divmod(self.size, self.batch_size)
        return num_full + (remainder > 0) - self._merges_remainder(num_full, remainder)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        """Return the size of one batch, or the sizes of a slice of batches."""
        last = len(self) - 1
        at = range(last + 1)[place]
        if isinstance(at, int):
            return self.batch_size if at < last else self.size - last * self.batch_size
        sizes = [self.batch_size] * len(at)
        if last in at:
            sizes[at.index(last)] = self[last]
        return sizes

    def _merges_remainder(self, num_full: int, remainder: int) -> bool:
        return remainder == 1 and num_full > 0 and self.batch_size > 1


def batch_sizes(size: int, batch_size: int) -> Sequence[int]:
    """Return the number of samples in each batch of an epoch, without building a list; see `BatchSizes`."""
    return BatchSizes(size, batch_size)


def iter_sequential(size: int, batch_size: int) -> Iterator[Tensor]:
    """Yield all rows once, in order, in batches."""
    return (torch.arange(start, min(start + batch_size, size)) for start in range(0, size, batch_size))


def iter_sampled(
    sampler: EpochSampler | ListedSampler,
    batch_size: int,
    *,
    start: int = 0,
    span: Callable[[int], tuple[int, int]] = lambda size: (0, size),
) -> Iterator[Tensor]:
    """Yield the rows of an epoch in batches; positions are computed in blocks, so no list of all samples is built.

    Args:
        sampler: The order of the epoch.
        batch_size: Samples per batch.
        start: The batch to begin with.
        span: Returns the part (from, to) of a batch of the given size to yield; by default all of it.
    """
    sizes = BatchSizes(sampler.size, batch_size)
    num_batches = max(1, _POSITIONS_PER_BLOCK // batch_size)
    for first in range(start, len(sizes), num_batches):
        spans = list(map(span, sizes[first : first + num_batches]))
        bases = range(first * batch_size, sampler.size, batch_size)
        positions = [np.arange(base + low, base + high) for base, (low, high) in zip(bases, spans, strict=False)]
        yield from torch.split(sampler.indices_at(np.concatenate(positions)), [high - low for low, high in spans])


def choose_batch_size(num_samples: int) -> int:
    """Return the largest power of two that gives at least 20 steps per epoch, from 8 to 32.

    Few samples in large batches are few optimizer steps, or many epochs. The number of ranks has no part in it, because
    a run may resume with another number.
    """
    return next((size for size in (32, 16) if num_samples >= 20 * size), 8)
