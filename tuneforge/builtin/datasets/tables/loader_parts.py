"""A torch DataLoader as data: which rows its sampler gives, in which order, and what its other arguments ask for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from tuneforge import DataError

_ENDLESS = 100  # passes over the dataset after which a sampler counts as endless
_WITHOUT_EFFECT = {
    "pin_memory": False, "timeout": 0, "prefetch_factor": None, "persistent_workers": False,
    "multiprocessing_context": None, "in_order": True,
}  # fmt: skip


@attrs.frozen(eq=False)
class LoaderParts:
    """What a DataLoader says about its dataset.

    Args:
        dataset: The dataset.
        rows: Rows that the sampler draws from, int64 (m,), ascending; None for all.
        sampler: The sampler whose order is used; None for a new permutation of the rows in each epoch.
        each_once: Whether the sampler gives each row once per pass.
        batch_size: Samples per batch.
        drop_last: Whether an incomplete last batch is left out.
        collate: What makes a batch of items; None for the default.
        notes: Sentences about arguments that have no effect.
        num_workers: Its processes.
    """

    dataset: Any
    rows: Tensor | None
    sampler: Iterable[int] | None
    each_once: bool
    batch_size: int
    drop_last: bool
    collate: Callable[[list[Any]], Any] | None
    notes: tuple[str, ...]
    num_workers: int

    @classmethod
    def read(cls, loader: DataLoader[Any], where: str, *, evaluates: bool = False) -> LoaderParts:
        """Return the parts of a DataLoader.

        Args:
            loader: The DataLoader.
            where: Name of the argument, for messages.
            evaluates: Whether it is for validation or test, where each row counts once, in any order.

        Raises:
            DataError: It asks for something that a run does not do.
        """
        if isinstance(loader.dataset, IterableDataset):
            return cls(loader.dataset, None, None, True, loader.batch_size or 1, False, None, (), 0)
        sampler, batch_size, drop_last = _unwrap_batch_sampler(loader, where)
        if loader.worker_init_fn is not None:
            fix = "remove it: random, numpy and torch are seeded for each sample; open files at first use"
            raise _refusal("a DataLoader with worker_init_fn", where, fix)
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise _refusal(
                f"{type(loader).__name__} iterates in its own way", where, "give a DataLoader, or its dataset"
            )
        rows, order, each_once = _read_sampler(sampler, len(loader.dataset), where)  # type: ignore[arg-type]
        if evaluates and (not each_once or drop_last):
            what = "drop_last=True" if drop_last else f"the sampler {_name(sampler)}, which may repeat or skip samples"
            raise _refusal(f"a DataLoader for evaluation with {what}", where, "evaluate each sample once")
        unused = [name for name, default in _WITHOUT_EFFECT.items() if getattr(loader, name, default) != default]
        notes = [f"{where}: not used, because results do not depend on it: {name} of the DataLoader" for name in unused]
        if isinstance(order, SequentialSampler) and not evaluates:
            notes.append(f"{where}: every epoch is in the order of the dataset; change it by shuffle=True")
        collate = None if loader.collate_fn is default_collate else loader.collate_fn
        return cls(
            loader.dataset, rows, order, each_once, batch_size, drop_last, collate, tuple(notes), loader.num_workers
        )


@attrs.define(eq=False)
class LoaderOrder:
    """The order of training samples that the sampler of a DataLoader gives: `Data.train_sampler`.

    Args:
        sampler: The sampler.
        positions: Row of the training split of each row of the dataset, int64; -1 for those of other splits.
        num_draws: Draws of an epoch.
        each_once: Whether the sampler gives each row once per pass.
        seed: Seed of the generator that the sampler was given; 0 if it has none.
    """

    sampler: Any
    positions: Tensor
    num_draws: int
    each_once: bool
    seed: int = attrs.field(default=0)

    @classmethod
    def from_parts(cls, parts: LoaderParts, train_rows: Tensor, num_rows: int) -> LoaderOrder | None:
        """Return the order for the rows of the dataset that are for training; None for a permutation by the run's seed.

        Raises:
            DataError: An epoch would have no batch.
        """
        sampler = parts.sampler
        if sampler is None:
            if not parts.drop_last or len(train_rows) % parts.batch_size == 0:
                return None
            sampler = RandomSampler(parts.dataset)
        size = len(train_rows) if parts.each_once else round(_length(sampler, num_rows) * len(train_rows) / num_rows)
        num_draws = size - size % parts.batch_size if parts.drop_last else max(1, size)
        if not num_draws:
            raise DataError(
                f"drop_last=True leaves no batch of {parts.batch_size} from {size} training samples",
                fix="use a smaller batch_size, or drop_last=False",
            )
        positions = torch.full((len(parts.dataset),), -1)
        positions[train_rows] = torch.arange(len(train_rows))
        generator = getattr(sampler, "generator", None)
        seed = 0 if generator is None else generator.initial_seed()
        return cls(sampler, positions, num_draws, parts.each_once, seed)

    def draw(self, epoch: int) -> Tensor:
        """Return the training rows of an epoch, int64 (num_draws,); draws of rows of other splits are passed over.

        Raises:
            DataError: The sampler gives no training row, or a row that the dataset does not have.
        """
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        found = torch.zeros(0, dtype=torch.int64)
        while len(found) < self.num_draws:
            drawn = self.positions[_one_pass(self.sampler, len(self.positions), "the DataLoader")]
            drawn = drawn[drawn >= 0]
            if not len(drawn):
                raise DataError(f"the sampler {_name(self.sampler)} gives no training sample", fix="check its indices")
            found = torch.cat([found, drawn])
        return found[: self.num_draws]


def _unwrap_batch_sampler(loader: DataLoader[Any], where: str) -> tuple[Any, int, bool]:
    """Return sampler, batch size and `drop_last`."""
    batches = loader.batch_sampler
    if batches is None:
        raise _refusal("a DataLoader with batch_size=None", where, "give batch_size, or the dataset alone")
    if type(batches) is not BatchSampler:
        fix = "give a sampler and batch_size, or the dataset and --batch-size"
        raise _refusal(f"a DataLoader with the batch_sampler {_name(batches)}", where, fix)
    return batches.sampler, batches.batch_size, batches.drop_last


def _read_sampler(sampler: Any, num_rows: int, where: str) -> tuple[Tensor | None, Any, bool]:
    """Return the rows that a sampler draws from, the sampler if its order matters, and whether each row comes once."""
    if "Distributed" in type(sampler).__name__:
        fix = "remove it: under torchrun each process gets its share of every batch"
        raise _refusal(f"a DataLoader with the sampler {_name(sampler)}", where, fix)
    if type(sampler) is RandomSampler and len(sampler.data_source) == num_rows:
        whole = not sampler.replacement and sampler.num_samples == num_rows
        return None, None if whole and sampler.generator is None else sampler, whole
    if type(sampler) is SequentialSampler and len(sampler.data_source) == num_rows:
        return None, sampler, True
    if type(sampler) is WeightedRandomSampler:
        usable = (torch.as_tensor(sampler.weights) > 0).nonzero().flatten()
        return None if len(usable) == num_rows else usable, sampler, False
    first, second = (_one_pass(sampler, num_rows, where) for _ in range(2))
    each_once = len(set(first.tolist())) == len(first) and torch.equal(first.sort().values, second.sort().values)
    if not each_once:
        return None, sampler, False
    order = None if type(sampler) is SubsetRandomSampler and sampler.generator is None else sampler
    return None if len(first) == num_rows else first.sort().values, order, True


def _one_pass(sampler: Any, num_rows: int, where: str) -> Tensor:
    """Return the rows that a sampler gives in one pass, int64."""
    drawn = list(itertools.islice(sampler, _ENDLESS * num_rows + 1))
    try:
        rows = torch.tensor([int(row) for row in drawn], dtype=torch.int64)
    except (TypeError, ValueError):
        raise _refusal(f"the sampler {_name(sampler)} gives no row numbers", where, "yield integers") from None
    if not len(rows) or len(rows) > _ENDLESS * num_rows or int(rows.min()) < 0 or int(rows.max()) >= num_rows:
        why = (
            f"it gives {len(rows)} rows" if not len(rows) or len(rows) > _ENDLESS * num_rows else f"one is {rows.max()}"
        )
        raise DataError(
            f"the sampler {_name(sampler)} does not fit the dataset",
            where=where,
            why=f"{why}; the dataset has {num_rows}",
            fix="correct its indices",
        )
    return rows


def _length(sampler: Any, num_rows: int) -> int:
    return len(sampler) if hasattr(sampler, "__len__") else len(_one_pass(sampler, num_rows, "the DataLoader"))


def _name(sampler: Any) -> str:
    return type(sampler).__name__


def _refusal(what: str, where: str, fix: str) -> DataError:
    return DataError(f"{what} is not supported", where=where, fix=fix)
