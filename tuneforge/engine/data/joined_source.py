"""Two splits as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Source, Split, TensorTree, concatenate_inputs, map_inputs
from tuneforge.engine.data.sample_seeds import fetch_seeded, is_random


@attrs.frozen(eq=False)
class JoinedSource:
    """The samples of one source, then those of another."""

    first: Source
    second: Source

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @property
    def draws_random(self) -> bool:
        """True if either may return another sample at each fetch."""
        return is_random(self.first) or is_random(self.second)

    def fetch(self, indices: Tensor) -> TensorTree:
        """Return the stored inputs at `indices`, int64 (b,)."""
        return self.fetch_seeded(indices, lambda position: None)

    def fetch_seeded(self, indices: Tensor, seed_sample: Callable[[int], None]) -> TensorTree:
        """Return the stored inputs at `indices`, each read after its seed was set."""
        size = len(self.first)
        parts, places = [], []
        for source, here, offset in ((self.first, indices < size, 0), (self.second, indices >= size, size)):
            place = here.nonzero().flatten()
            if len(place):
                seed_by_position = _SeedAt(seed_sample, [*place.tolist(), len(indices)])
                parts.append(_fetch(source, indices[place] - offset, seed_by_position))
                places.append(place)
        order = torch.cat(places).argsort()
        return map_inputs(concatenate_inputs(parts), lambda tensor: tensor.index_select(0, order))

    @property
    def paths(self) -> list[str | Path] | None:
        """The file of each sample; None if a source reads no files."""
        first, second = (getattr(source, "paths", None) for source in (self.first, self.second))
        return None if first is None or second is None else [*first, *second]

    def fingerprint(self) -> str | None:
        """Return a SHA-256 over both fingerprints; None if a source cannot tell."""
        both = [getattr(source, "fingerprint", lambda: None)() for source in (self.first, self.second)]
        return None if None in both else hashlib.sha256(" ".join(map(str, both)).encode()).hexdigest()


@attrs.frozen(eq=False)
class _SeedAt:
    """Seeds the sample at a position of a part of a batch by its position in the batch."""

    seed_sample: Callable[[int], None]
    positions: list[int]

    def __call__(self, position: int) -> None:
        self.seed_sample(self.positions[position])


def join_splits(first: Split, second: Split) -> Split:
    """Return one split with the samples of both, in order."""
    ids = [*map(first.id_of, range(len(first))), *map(second.id_of, range(len(second)))]
    targets = torch.cat([first.targets, second.targets])
    if first.in_memory and second.in_memory:
        inputs = [split.fetch(torch.arange(len(split))) for split in (first, second)]
        return Split(concatenate_inputs(inputs), targets, ids=ids)
    return Split(JoinedSource(first.source, second.source), targets, ids=ids)


def _fetch(source: Source, indices: Tensor, seed_sample: Callable[[int], None]) -> TensorTree:
    return fetch_seeded(source, indices, seed_sample) if is_random(source) else source.fetch(indices)
