"""Samples of evaluation splits that are also in the training split."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tuneforge.engine.data.dataset import Data, InMemorySource, Split, named_tensors

_MAX_BYTES = 2**28  # of inputs that are compared
_MIN_DISTINCT = 0.5  # share of the training samples below which equal inputs are no sign of copies


def describe_copies(data: Data) -> list[str]:
    """Return a sentence for each evaluation split of which samples have the inputs of a training sample.

    Only samples in memory are compared, and only if most training samples differ: equal rows of a few categories are
    no copies.
    """
    splits = {name: split for name, split in data.splits().items() if split is not data.train and len(split)}
    if not data.train.in_memory or any("duplicate in train" in note for note in data.notes):
        return []
    known = set(_rows(data.train))
    if len(known) < _MIN_DISTINCT * len(data.train):
        return []
    notes = []
    for name, split in splits.items():
        copies = sum(row in known for row in _rows(split)) if split.in_memory else 0
        if copies:
            notes.append(
                f"{name}: {copies} of {len(split)} samples have the inputs of a training sample; if they are copies, "
                "the metrics are too high: remove them, or keep copies in one split by a group"
            )
    return notes


def _rows(split: Split) -> Iterator[bytes]:
    """Yield the bytes of the inputs of each sample; nothing if there are too many."""
    assert isinstance(split.source, InMemorySource)
    stored = named_tensors(split.source.inputs)
    if any(tensor.layout != torch.strided for tensor in stored.values()):
        return
    if sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) > _MAX_BYTES:
        return
    arrays = [tensor.reshape(len(tensor), -1).view(torch.uint8).numpy() for tensor in stored.values()]
    for row in range(len(split)):
        yield b"".join(array[row].tobytes() for array in arrays)
