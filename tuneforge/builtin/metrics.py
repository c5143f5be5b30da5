"""Metrics, accumulated batch by batch as sums on the device of the outputs; memory does not grow with the samples.

Sums are float64 where the device supports it. Definitions, names and
values for a denominator of 0 are scikit-learn's. Without samples, every metric is NaN.

Shapes: b samples in a batch, k classes, labels or numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tuneforge import DataError, between, component, ge, hookimpl, option
from tuneforge.builtin.confusion import ConfusionCells, RowScan, count_cells
from tuneforge.builtin.targets import to_columns

if TYPE_CHECKING:
    from tuneforge import Metrics, Run

_NAN = math.nan
_MAX_PENDING = 65_536  # samples whose values are kept before they are summed
MAX_MATRIX_CLASSES = 100
"""The most classes for which a whole confusion matrix is reported."""
_MAX_CONFUSIONS = 1_000


@component(api=1)
class Classification:
    """Accuracy, precision, recall and F1 (macro, weighted, per class), top-k, confusion and calibration.

    Macro averages are over the classes that occur among the labels (scikit-learn's with `labels=unique(y_true)`), so a
    split with some of the classes is evaluated on these, and a prediction of another class still lowers recall. A ratio
    with denominator 0 is 0. A NaN output counts as a misclassification, and makes `loss` and `ece` NaN.
    """

    top_k: int = option(
        default=3,
        help="k of top-k accuracy; omitted where there are at most k classes.",
        check=ge(1),
    )
    bins: int = option(default=15, help="Number of bins of the expected calibration error.", check=ge(1))

    @hookimpl
    def evaluate(self, run: Run) -> Metrics:
        """Return a new accumulator, which takes outputs (b, k) and targets int64 (b,)."""
        return ClassificationMetrics(run.data.targets.labels, top_k=self.top_k, num_bins=self.bins)


@component(api=1)
class Multilabel:
    """Exact match, Hamming loss, precision, recall and F1 (macro, micro, per label).

    Macro averages are over all labels, as in scikit-learn; a ratio with denominator 0 is 0.
    """

    threshold: float = option(default=0.5, help="Probability from which a label is predicted.", check=between(0, 1))

    @hookimpl
    def evaluate(self, run: Run) -> Metrics:
        """Return a new accumulator, which takes outputs (b, k) and targets 0 or 1, float (b, k)."""
        return MultilabelMetrics(run.data.targets.labels, threshold=self.threshold)


@component(api=1)
class Regression:
    """Mean absolute error, root mean squared error and R2 in original units; the loss in standardized units.

    With several outputs, a metric is the mean over them, as in scikit-learn, and `per_output` has each.
    """

    @hookimpl
    def evaluate(self, run: Run) -> Metrics:
        """Return a new accumulator, which takes outputs (b, k) and targets (b,) or (b, k)."""
        targets = run.data.targets
        return RegressionMetrics(getattr(targets, "names", ()), scales=getattr(targets, "scales", (1.0,)))


class ClassificationMetrics:
    """The accumulator of `Classification`.

    Args:
        labels: Names of the classes; indices if empty.
        top_k: k of `top{k}_accuracy`.
        num_bins: Number of bins of `ece`.
    """

    def __init__(self, labels: Sequence[str], *, top_k: int, num_bins: int) -> None:
        self.labels, self.top_k, self.num_bins = tuple(labels), top_k, num_bins
        self._count = 0
        self._pending: list[Tensor] = []  # label, prediction, confidence, in top k, loss, each of many samples
        self._num_pending = 0
        self._sums: dict[str, Tensor] = {}
        self._cells: ConfusionCells | None = None
        self._scan = RowScan()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: outputs (b, k), targets int64 (b,) or probabilities (b, k), whose argmax is the label.

        Raises:
            DataError: The number of outputs is not that of the classes.
        """
        self.labels = _resolve_labels(self.labels, outputs)
        labels_b = targets if targets.ndim == 1 else targets.argmax(1)
        scores = (outputs if outputs.dtype == torch.float64 else outputs.float()).detach()
        log_probabilities = scores.log_softmax(1)
        losses = (
            F.nll_loss(log_probabilities, targets, reduction="none")
            if targets.ndim == 1
            else F.cross_entropy(scores, targets, reduction="none")
        )
        predicted, num_before = self._scan.scan(scores, labels_b)
        confidence = log_probabilities.amax(1).exp()
        self._keep((labels_b, predicted, confidence, num_before < self.top_k, losses))

    def _keep(self, values: tuple[Tensor, ...]) -> None:
        """Copy values of the samples of a batch, each (b,), behind those that are not summed yet.

        Kept as they are, these small tensors would lie between the large ones of each batch, and the memory of those
        could not be used again: 2 GB with 20,000 classes.
        """
        size = len(values[0])
        if not self._pending or self._num_pending + size > len(self._pending[0]):
            self._add_pending()
            with torch.inference_mode(False):  # a later update may come outside of inference mode
                self._pending = [value.new_empty(max(size, _MAX_PENDING)) for value in values]
        for held, value in zip(self._pending, values, strict=True):
            held[self._num_pending : self._num_pending + size] = value
        self._num_pending += size
        self._count += size

    def _add_pending(self) -> None:
        """Reduce the values of single samples to sums; many batches at once, because each operation has a cost."""
        if not self._num_pending:
            return
        labels_n, predicted, confidence, in_top, losses = (held[: self._num_pending] for held in self._pending)
        self._num_pending = 0
        num_classes, broken = len(self.labels), confidence.isnan()
        correct = (predicted == labels_n) & ~broken
        codes = labels_n * (num_classes + 1) + torch.where(broken, num_classes, predicted)
        self._cells = count_cells(codes, num_classes, self._cells)
        _add(self._sums, "loss", losses.sum(dtype=_accumulation_dtype(losses)))
        _add(self._sums, "top", (in_top & ~broken).sum())
        _add(self._sums, "bins", _bin_by_confidence(confidence, correct, self.num_bins))

    def compute(self) -> dict[str, Any]:
        """Return the metrics so far.

        With up to 100 classes, `confusion` has a row per label and a column per prediction. With more,
        `largest_confusions` has the most frequent wrong predictions, as (label, prediction, samples) with indices of
        classes.
        """
        self._add_pending()
        num_classes, count = len(self.labels), self._count
        cells = self._cells or count_cells(torch.zeros(0, dtype=torch.int64), num_classes, None)
        support, given, correct = cells.sums()
        rates = _precision_recall_f1(correct, given, support)
        seen = support > 0
        macro = {f"{name}_macro": _mean(values[seen]) for name, values in rates.items()}
        weighted = {f"{name}_weighted": _ratio(float(values @ support), count) for name, values in rates.items()}
        top = _ratio(_get_sum(self._sums, "top"), count)
        return {
            "loss": _ratio(_get_sum(self._sums, "loss"), count),
            "accuracy": _ratio(float(correct.sum()), count),
            **macro,
            **weighted,
            **self._find_hardest_class(rates["recall"], support),
            **({f"top{self.top_k}_accuracy": top} if self.top_k < num_classes else {}),
            "ece": self._compute_calibration_error(),
            "per_class": _format_per_label(self.labels, rates, support, count),
            **(
                {"confusion": cells.to_matrix().tolist()}
                if num_classes <= MAX_MATRIX_CLASSES
                else {"largest_confusions": cells.largest_confusions(_MAX_CONFUSIONS).tolist()}
            ),
        }

    def _find_hardest_class(self, recall: Tensor, support: Tensor) -> dict[str, Any]:
        """Return the lowest recall and the first class that has it; NaN and None without samples."""
        if not self._count:
            return {"recall_min": _NAN, "hardest_class": None}
        worst = int(recall.masked_fill(support == 0, math.inf).argmin())
        return {"recall_min": float(recall[worst]), "hardest_class": self.labels[worst]}

    def _compute_calibration_error(self) -> float:
        """Return the expected calibration error over equal-width bins (Guo et al. 2017, 1706.04599, equation 3)."""
        if not self._count:
            return _NAN
        confidence, correct = self._sums["bins"].cpu().double().unbind(1)
        return float((correct - confidence).abs().sum()) / self._count


class MultilabelMetrics:
    """The accumulator of `Multilabel`.

    Args:
        labels: Names of the labels; indices if empty.
        threshold: Probability from which a label is predicted.
    """

    def __init__(self, labels: Sequence[str], *, threshold: float) -> None:
        self.labels, self.threshold = tuple(labels), threshold
        self._count = 0
        self._sums: dict[str, Tensor] = {}

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: outputs (b, k), targets 0 or 1 (b, k).

        Raises:
            DataError: The number of outputs or targets is not that of the labels.
        """
        outputs, targets = to_columns(outputs, targets)
        self.labels = _resolve_labels(self.labels, outputs)
        held = targets >= 0.5
        given = outputs.float().sigmoid() >= self.threshold
        wrong = (held != given) | outputs.isnan()
        losses = F.binary_cross_entropy_with_logits(outputs.float(), targets.float(), reduction="none")
        self._count += len(outputs)
        _add(self._sums, "loss", losses.sum(dtype=_accumulation_dtype(outputs)))
        _add(self._sums, "exact", (~wrong.any(1)).sum())
        _add(self._sums, "wrong", wrong.sum())
        _add(self._sums, "labels", torch.stack([(held & given).sum(0), given.sum(0), held.sum(0)]))

    def compute(self) -> dict[str, Any]:
        """Return the metrics so far."""
        num_labels = len(self.labels)
        correct, given, support = self._sums.get("labels", torch.zeros(3, num_labels)).cpu().double()
        rates = _precision_recall_f1(correct, given, support)
        micro = _precision_recall_f1(*(each.sum()[None] for each in (correct, given, support)))
        count, flags = self._count, self._count * num_labels
        return {
            "loss": _ratio(_get_sum(self._sums, "loss"), flags),
            "exact_match": _ratio(_get_sum(self._sums, "exact"), count),
            "hamming_loss": _ratio(_get_sum(self._sums, "wrong"), flags),
            **{f"{name}_macro": _mean(values) if count else _NAN for name, values in rates.items()},
            **{f"{name}_micro": _mean(values) if count else _NAN for name, values in micro.items()},
            "per_class": _format_per_label(self.labels, rates, support, count),
        }


class RegressionMetrics:
    """The accumulator of `Regression`.

    Args:
        names: Names of the outputs, for `per_output`.
        scales: Standard deviation by which each target was divided, or one for all.
    """

    def __init__(self, names: Sequence[str], *, scales: Sequence[float]) -> None:
        self.names, self.scales = tuple(names), tuple(scales)
        self._count = 0
        self._sums: dict[str, Tensor] = {}

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: outputs (b, k), targets (b,) or (b, k), both standardized.

        Raises:
            DataError: Their shapes do not match.
        """
        if not len(outputs):
            return
        outputs, targets = (each.to(_accumulation_dtype(outputs)) for each in to_columns(outputs, targets))
        errors = outputs - targets
        self._merge_target_moments(targets)
        _add(self._sums, "absolute", errors.abs().sum(0))
        _add(self._sums, "squared", errors.square().sum(0))

    def _merge_target_moments(self, targets: Tensor) -> None:
        """Update the mean and the squared deviations of the targets (Chan, Golub and LeVeque 1979)."""
        before, count = self._count, len(targets)
        mean = targets.mean(0)
        deviation = (targets - mean).square().sum(0)
        self._count = before + count
        if before:
            shift = mean - self._sums["mean"]
            mean = self._sums["mean"] + shift * (count / self._count)
            deviation = self._sums["deviation"] + deviation + shift.square() * (before * count / self._count)
        self._sums.update(mean=mean, deviation=deviation)

    def compute(self) -> dict[str, Any]:
        """Return the metrics so far."""
        if not self._count:
            return dict.fromkeys(("loss", "mae", "rmse", "r2"), _NAN)
        sums = {name: values.cpu().double() for name, values in self._sums.items()}
        scales = torch.tensor(self.scales, dtype=torch.float64)
        mean_squared = sums["squared"] / self._count
        metrics = {
            "mae": sums["absolute"] / self._count * scales,
            "rmse": mean_squared.sqrt() * scales,
            "r2": self._compute_r2(sums),
        }
        out: dict[str, Any] = {"loss": _mean(mean_squared), **{name: _mean(each) for name, each in metrics.items()}}
        if len(mean_squared) > 1:
            names = self.names if len(self.names) == len(mean_squared) else [str(i) for i in range(len(mean_squared))]
            table = torch.stack(list(metrics.values()), 1).tolist()
            out["per_output"] = {
                name: dict(zip(metrics, row, strict=True)) for name, row in zip(names, table, strict=True)
            }
        return out

    def _compute_r2(self, sums: dict[str, Tensor]) -> Tensor:
        """Return R2 of each output (k,): for constant targets 1 if predictions are exact, else 0; NaN if n is 1."""
        if self._count < 2:
            return torch.full_like(sums["mean"], _NAN)
        rounding = self._count * (4 * torch.finfo(torch.float64).eps * sums["mean"]).square()
        constant = sums["deviation"] <= rounding
        exact = torch.where(sums["squared"] <= rounding, 1.0, sums["squared"] * 0.0)
        return torch.where(constant, exact, 1 - sums["squared"] / sums["deviation"])


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the widest float dtype of the tensor's device."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _resolve_labels(labels: tuple[str, ...], outputs: Tensor) -> tuple[str, ...]:
    """Return the labels, or indices of the outputs if there are none.

    Raises:
        DataError: The number of labels differs from that of the outputs.
    """
    if outputs.ndim != 2 or (labels and outputs.shape[1] != len(labels)):
        raise DataError(
            f"outputs {tuple(outputs.shape)} for {len(labels)} labels",
            why="each label needs one output",
            fix="give the head that many outputs (--adapt head does)",
        )
    return labels or tuple(str(index) for index in range(outputs.shape[1]))


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _bin_by_confidence(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    """Return the sum of confidences and the number of correct predictions of each bin (bins, 2).

    A bin includes its upper edge. Computed as a product with a one-hot matrix, because adding floats by index is not
    deterministic on CUDA.
    """
    place = (confidence.nan_to_num() * bins).ceil().sub(1).clamp(0, bins - 1)
    member = (torch.arange(bins, device=place.device)[:, None] == place).to(_accumulation_dtype(confidence))
    return member @ torch.stack([confidence, correct.to(confidence)], 1).to(member)


def _precision_recall_f1(correct: Tensor, given: Tensor, support: Tensor) -> dict[str, Tensor]:
    """Return precision, recall and F1 of each class (k,), 0 where the denominator is 0."""
    return {
        "precision": correct / given.clamp_min(1),
        "recall": correct / support.clamp_min(1),
        "f1": 2 * correct / (given + support).clamp_min(1),
    }


def _format_per_label(labels: Sequence[str], rates: dict[str, Tensor], support: Tensor, count: int) -> dict[str, Any]:
    """Return the metrics of each label, with the keys of scikit-learn's `classification_report`."""
    columns = [(values if count else values * _NAN).tolist() for values in rates.values()]
    return {
        label: {"precision": precision, "recall": recall, "f1-score": f1, "support": int(number)}
        for label, precision, recall, f1, number in zip(labels, *columns, support.tolist(), strict=True)
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else _NAN


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else _NAN


def _get_sum(sums: dict[str, Tensor], name: str) -> float:
    return float(sums[name]) if name in sums else _NAN
