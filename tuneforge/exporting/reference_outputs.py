"""Reference data of a bundle: reference outputs, a reference for drift, and digests of the training samples.

Shapes: n samples of a split, m of them remembered, b in a batch, k outputs, d numbers that sum an input up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Split, Targets, TensorTree, named_tensors
from tuneforge.engine.data.loader import fetch_batches, iter_sequential
from tuneforge.engine.storage.safetensors_io import load_tensors, save_tensors
from tuneforge.exporting.formats import Forward, compute_predictions

REFERENCE_FILE = "reference.safetensors"

NUM_PROBES = 16
"""Number of test samples that are stored with their outputs."""

MAX_REFERENCE_SAMPLES = 1000
"""Largest number of samples per split whose summaries and predictions are stored for a two-sample test."""

_TENSOR_FIELDS = ("probe_outputs", "summaries", "predictions", "train_digests", "duplicate_fraction", "reference_ids")
_PROBE_PREFIX = "probe_inputs/"
_NUM_BANDS = 16
_BATCH = 256


@attrs.frozen(eq=False)
class ReferenceData:
    """The reference data of a bundle.

    Args:
        probe_inputs: Stored inputs of some test samples, evenly spread over the split.
        probe_outputs: Outputs of the model for them, float32 (m, k).
        summaries: Summaries of inputs that were not trained on, float32 (m, d); see `summarize_inputs`.
        predictions: Predicted probabilities or values for these, float32 (m, k).
        train_digests: Digests of the stored training samples, int64, sorted, each once.
        duplicate_fraction: The share of training samples whose stored form occurs more than once among them, (): so
            many test samples are to be expected among them too.
        reference_ids: Where each of the m inputs comes from, int64 (m,): 0 is the test split, the others are what
            production sent before one of the turns that the model was tuned in.
    """

    probe_inputs: TensorTree
    probe_outputs: Tensor
    summaries: Tensor
    predictions: Tensor
    train_digests: Tensor
    duplicate_fraction: Tensor
    reference_ids: Tensor = attrs.Factory(
        lambda self: torch.zeros(len(self.summaries), dtype=torch.int64), takes_self=True
    )

    def save(self, folder: Path) -> None:
        """Write the reference data to a bundle."""
        tensors = {f"{_PROBE_PREFIX}{name}": tensor for name, tensor in named_tensors(self.probe_inputs).items()}
        others = {name: getattr(self, name) for name in _TENSOR_FIELDS}
        save_tensors(tensors | others, folder / REFERENCE_FILE)

    @classmethod
    def read(cls, folder: Path) -> ReferenceData:
        """Read the reference data of a bundle.

        Raises:
            FolderError: The file is missing.
            UnsafeFileError: It is no safetensors file.
        """
        tensors, _ = load_tensors(folder / REFERENCE_FILE)
        names = [key for key in sorted(tensors) if key.startswith(_PROBE_PREFIX)]
        probe = {key.removeprefix(_PROBE_PREFIX): tensors.pop(key) for key in names}
        return cls(probe_inputs=probe.get("", probe), **tensors)

    def was_trained_on(self, split: Split) -> Tensor:
        """Tell for each sample of a split whether the model was trained on it, bool (n,), by the stored inputs."""
        return torch.isin(hash_samples(split), self.train_digests)


def build_reference_data(
    forward: Forward, targets: Targets, *, train: Split, test: Split, reference_splits: Sequence[Split] = ()
) -> ReferenceData:
    """The reference data of a model that was tuned on `train`, as it answers on `test` and on other samples."""
    probe = test.fetch(evenly_spaced_rows(len(test), NUM_PROBES))
    chosen = [each.subset(evenly_spaced_rows(len(each), MAX_REFERENCE_SAMPLES)) for each in (test, *reference_splits)]
    parts = [
        (summarize_inputs(stored), forward(stored))
        for split in chosen
        for _, stored in fetch_batches(split, iter_sequential(len(split), _BATCH), workers=0)
    ]
    summaries, outputs = (torch.cat(each) for each in zip(*parts, strict=True))
    train_digests, counts = torch.unique(hash_samples(train), return_counts=True)
    duplicate_fraction = counts[counts > 1].sum() / counts.sum()
    reference_ids = torch.repeat_interleave(torch.tensor([len(each) for each in chosen]))
    return ReferenceData(
        probe,
        forward(probe),
        summaries,
        compute_predictions(targets, outputs),
        train_digests,
        duplicate_fraction,
        reference_ids,
    )


def evenly_spaced_rows(count: int, max_rows: int) -> Tensor:
    """At most `max_rows` rows of `count`, evenly spread, int64."""
    return torch.linspace(0, count - 1, min(count, max_rows)).round().long()


def summarize_inputs(stored: TensorTree) -> Tensor:
    """Each stored input of a batch as a few numbers, float32 (b, d): the same numbers for the same input anywhere.

    An input of at most 32 numbers is these numbers; of a longer one, such as an image, they are the mean, the standard
    deviation, and the means of 16 bands of equal length, in the order in which it is stored.
    """
    return torch.cat([_summarize_tensor(tensor) for _, tensor in sorted(named_tensors(stored).items())], 1)


def hash_samples(split: Split) -> Tensor:
    """A 64-bit digest of each sample's stored form, int64 (n,): equal for equal samples."""
    found = [_hash_batch(stored) for _, stored in fetch_batches(split, iter_sequential(len(split), _BATCH), workers=0)]
    return torch.tensor([each for batch in found for each in batch], dtype=torch.int64)


def _summarize_tensor(tensor: Tensor) -> Tensor:
    flat = tensor.flatten(1).float() if tensor.ndim > 1 else tensor[:, None].float()
    if flat.shape[1] <= 2 * _NUM_BANDS:
        return flat
    bands = torch.stack([band.mean(1) for band in flat.tensor_split(_NUM_BANDS, 1)], 1)
    return torch.cat([flat.mean(1, keepdim=True), flat.std(1, correction=0, keepdim=True), bands], 1)


def _hash_batch(stored: TensorTree) -> list[int]:
    named: Mapping[str, Tensor] = dict(sorted(named_tensors(stored).items()))
    rows = len(next(iter(named.values())))
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(rows)]
    for name, tensor in named.items():
        for each, sample in zip(hashes, tensor.contiguous().reshape(rows, -1), strict=True):
            each.update(name.encode() + b"\0" + sample.view(torch.uint8).numpy().tobytes())
    return [int.from_bytes(each.digest(), "little", signed=True) for each in hashes]
