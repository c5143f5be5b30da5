"""What identifies the samples of a split, so that a resumed run can tell whether they are those it was started with."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Split, named_tensors
from tuneforge.engine.data.sample_seeds import is_random

_FIRST_ROWS = 4
_BLOCK_ROWS = 32
_READING_TIME_S = 0.5
"""Time after which no further rows are read of a source that has no fingerprint."""


def describe_split(split: Split) -> dict[str, Any]:
    """Return the number of samples of a split, and SHA-256 hashes of its inputs, targets and ids, as plain data.

    The inputs of a source without a fingerprint have one hash per chunk of rows, for as many chunks as can be read in
    half a second: two descriptions agree where the hashes that both have are equal. A source that has an attribute
    `content_hash`, because it has read all samples, is not read again. The hash is None if the source cannot tell, or
    if rows differ when they are read again.
    """
    ids = "\0".join(map(split.id_of, range(len(split)))).encode(errors="surrogateescape")
    underlying = getattr(split.source, "underlying", split.source)
    known = split.inputs_fingerprint() if not is_random(split.source) else getattr(underlying, "content_hash", None)
    return {
        "samples": len(split),
        "inputs": _hash_chunks(split) if is_random(split.source) and known is None else known,
        "targets": hash_tensors({"": split.targets}),
        "ids": hashlib.sha256(ids).hexdigest(),
    }


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return a SHA-256 over the names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_chunks(split: Split) -> list[str] | None:
    """Return a hash per chunk of rows in a fixed order, each chunk as large as all before; None for random samples.

    The last chunk is left out if it is not complete.
    """
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    hashes: list[str] = []
    start, stop, began = 0, min(_FIRST_ROWS, len(order)), time.monotonic()
    while stop <= len(order) and time.monotonic() - began < _READING_TIME_S:
        hashes.append(_hash_rows(split, order[start:stop]))
        if not start and hashes != [_hash_rows(split, order[:stop])]:
            return None
        start, stop = stop, 2 * stop
    return hashes


def _hash_rows(split: Split, rows: Tensor) -> str:
    digest = hashlib.sha256()
    for few in torch.split(rows, _BLOCK_ROWS):
        digest.update(hash_tensors(named_tensors(split.fetch(few))).encode())
    return digest.hexdigest()
