"""What a bundle remembers of data: answers to compare with, a reference for drift, and what was trained on.

Shapes: n samples of a split, m of them remembered, b in a batch, k outputs, d numbers that sum an input up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Inputable, Split, Targets, tensors_of
from tuneforge.engine.data.loader import fetched, in_turn
from tuneforge.engine.storage.safetensors_io import load_tensors, save_tensors
from tuneforge.exporting.formats import Forward, answers_of

FILE = "evidence.safetensors"

PROBES = 16
"""Test samples kept as they are stored, with their outputs."""

REFERENCE = 1000
"""Samples of a world at most whose summaries and answers are kept for a two-sample test."""

_OTHERS = ("outputs", "summaries", "answers", "seen", "repeated", "worlds")
_BANDS = 16
_BATCH = 256


@attrs.frozen(eq=False)
class Evidence:
    """What a bundle remembers of data.

    Args:
        probe: Stored inputs of some test samples, evenly spread over the split.
        outputs: What the model gave for them, float32 (m, k).
        summaries: Of some inputs that were not trained on, float32 (m, d); see `summary`.
        answers: Probabilities or numbers given for these, float32 (m, k).
        seen: Digests of the stored training samples, int64, sorted, each once.
        repeated: The share of training samples whose stored form occurs more than once among them, (): so many test
            samples are to be expected among them too.
        worlds: Where each of the m inputs comes from, int64 (m,): 0 is the test split, the others are what production
            sent before one of the turns that the model was tuned in.
    """

    probe: Inputable
    outputs: Tensor
    summaries: Tensor
    answers: Tensor
    seen: Tensor
    repeated: Tensor
    worlds: Tensor = attrs.Factory(lambda self: torch.zeros(len(self.summaries), dtype=torch.int64), takes_self=True)

    def save(self, folder: Path) -> None:
        """Write it into a bundle."""
        tensors = {f"probe/{name}": tensor for name, tensor in tensors_of(self.probe).items()}
        others = {name: getattr(self, name) for name in _OTHERS}
        save_tensors(tensors | others, folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """Read it from a bundle.

        Raises:
            FolderError: The file is missing.
            UnsafeFileError: It is no safetensors file.
        """
        tensors, _ = load_tensors(folder / FILE)
        probe = {key.removeprefix("probe/"): tensors.pop(key) for key in sorted(tensors) if key.startswith("probe/")}
        return cls(probe=probe.get("", probe), **tensors)


def gathered(
    forward: Forward, targets: Targets, *, train: Split, test: Split, worlds: Sequence[Split] = ()
) -> Evidence:
    """The evidence of a model that was tuned on `train`, as it answers on `test` and on samples of other worlds."""
    probe = test.fetch(spread(len(test), PROBES))
    chosen = [each.take(spread(len(each), REFERENCE)) for each in (test, *worlds)]
    parts = [
        (summary(stored), forward(stored))
        for split in chosen
        for _, stored in fetched(split, in_turn(len(split), _BATCH), workers=0)
    ]
    summaries, outputs = (torch.cat(each) for each in zip(*parts, strict=True))
    seen, counts = torch.unique(digests(train), return_counts=True)
    repeated = counts[counts > 1].sum() / counts.sum()
    origin = torch.repeat_interleave(torch.tensor([len(each) for each in chosen]))
    return Evidence(probe, forward(probe), summaries, answers_of(targets, outputs), seen, repeated, origin)


def spread(count: int, most: int) -> Tensor:
    """At most `most` rows of `count`, evenly spread, int64."""
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def summary(stored: Inputable) -> Tensor:
    """Each stored input of a batch as a few numbers, float32 (b, d): the same numbers for the same input anywhere.

    An input of at most 32 numbers is these numbers; of a longer one, such as a picture, they are the mean, the standard
    deviation, and the means of 16 bands of equal length, in the order in which it is stored.
    """
    return torch.cat([_summed(tensor) for _, tensor in sorted(tensors_of(stored).items())], 1)


def digests(split: Split) -> Tensor:
    """A 64-bit digest of each sample's stored form, int64 (n,): equal for equal samples."""
    found = [_digests(stored) for _, stored in fetched(split, in_turn(len(split), _BATCH), workers=0)]
    return torch.tensor([each for batch in found for each in batch], dtype=torch.int64)


def _summed(tensor: Tensor) -> Tensor:
    flat = tensor.flatten(1).float() if tensor.ndim > 1 else tensor[:, None].float()
    if flat.shape[1] <= 2 * _BANDS:
        return flat
    bands = torch.stack([band.mean(1) for band in flat.tensor_split(_BANDS, 1)], 1)
    return torch.cat([flat.mean(1, keepdim=True), flat.std(1, correction=0, keepdim=True), bands], 1)


def _digests(stored: Inputable) -> list[int]:
    named: Mapping[str, Tensor] = dict(sorted(tensors_of(stored).items()))
    rows = len(next(iter(named.values())))
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(rows)]
    for name, tensor in named.items():
        for each, sample in zip(hashes, tensor.contiguous().reshape(rows, -1), strict=True):
            each.update(name.encode() + b"\0" + sample.view(torch.uint8).numpy().tobytes())
    return [int.from_bytes(each.digest(), "little", signed=True) for each in hashes]
