"""Predictions and confusions of classes, in time and memory that thousands of classes allow.

Shapes: n samples, b samples in a batch, k classes.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class ConfusionCells:
    """The cells of a confusion matrix that are not 0, so that memory grows with the samples and not with k * k.

    Args:
        codes: label * (k + 1) + prediction of each cell, ascending, int64 (cells,); the prediction k is a NaN output.
        counts: Samples of each cell, int64 (cells,).
        num_classes: k.
    """

    codes: Tensor
    counts: Tensor
    num_classes: int

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the samples, the predictions and the correct predictions of each class, float64 (k,) on the CPU."""
        rows, columns, counts = self._triples()
        width = self.num_classes + 1
        totals = [
            torch.zeros(width, dtype=torch.int64).index_add_(0, places, counts[chosen]).double()[:-1]
            for places, chosen in ((rows, ...), (columns, ...), (rows[rows == columns], rows == columns))
        ]
        return totals[0], totals[1], totals[2]

    def to_matrix(self) -> Tensor:
        """Return the counts, int64 (k, k): a row per label, a column per prediction that is not NaN."""
        width = self.num_classes + 1
        dense = torch.zeros(self.num_classes * width, dtype=torch.int64)
        dense[self.codes.cpu()] = self.counts.cpu()
        return dense.view(self.num_classes, width)[:, :-1]

    def largest_confusions(self, most: int) -> Tensor:
        """Return label, prediction and samples (most, 3) of wrong predictions, the most frequent first."""
        rows, columns, counts = self._triples()
        wrong = (rows != columns) & (columns < self.num_classes)
        triples = torch.stack([rows, columns, counts], 1)[wrong]
        order = triples[:, 2].argsort(descending=True, stable=True)[:most]
        return triples[order]

    def _triples(self) -> tuple[Tensor, Tensor, Tensor]:
        codes, width = self.codes.cpu(), self.num_classes + 1
        return codes // width, codes % width, self.counts.cpu()


def count_cells(codes: Tensor, num_classes: int, before: ConfusionCells | None) -> ConfusionCells:
    """Return the cells of samples with these codes, int64 (n,), added to those before."""
    counts = torch.ones_like(codes)
    if before is not None:
        codes, counts = torch.cat([before.codes, codes]), torch.cat([before.counts, counts])
    found, inverse = torch.unique(codes, return_inverse=True)
    return ConfusionCells(found, torch.zeros_like(found).index_add_(0, inverse, counts), num_classes)


class RowScan:
    """Finds the prediction and the rank of the label in each row of scores.

    A comparison that writes floats into memory that exists is many times as fast on the CPU as one that creates
    booleans, so two buffers of the size of a batch are kept.
    """

    def __init__(self) -> None:
        self._buffers = torch.empty(0)

    def scan(self, scores: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of the highest score (b,), and how many classes come before the label (b,).

        Of equal scores the one of the lower index comes first. The index is k for a row with NaN.
        """
        size = scores.shape[1]
        first, second = self._resize(scores)
        index = torch.arange(size, device=scores.device, dtype=scores.dtype)  # exact below 2 ** 24 classes
        torch.eq(scores, scores.amax(1, keepdim=True), out=first)
        predicted = size - first.mul_(size - index).amax(1).long()
        own = scores.gather(1, labels_b[:, None])
        torch.lt(index, labels_b[:, None].to(scores), out=first)
        num_equal = torch.eq(scores, own, out=second).mul_(first).sum(1)
        return predicted, torch.gt(scores, own, out=second).sum(1) + num_equal

    def _resize(self, scores: Tensor) -> Tensor:
        """Return two buffers with the shape, the dtype and the device of `scores`."""
        held = self._buffers
        if held.dtype != scores.dtype or held.device != scores.device or held.numel() < 2 * scores.numel():
            with torch.inference_mode(False):  # a later batch may come outside of inference mode
                held = self._buffers = scores.new_empty(2 * scores.numel())
        return held[: 2 * scores.numel()].view(2, *scores.shape)
