"""Targets: one of several classes, any number of labels, or numbers with units.

Shapes: n samples in a split, b in a batch, k outputs, f features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tuneforge import DataError, OptionError, Targets, component, option
from tuneforge.builtin.checks import POSITIVE_NUMBERS
from tuneforge.builtin.head_solver import (
    Doubles,
    ScaledFeatures,
    cross_validate_logistic,
    fit_binary,
    fit_logistic,
    fit_ridge,
    leave_one_out_ridge,
    log_sum_exp,
    scale_and_choose,
)
from tuneforge.errors import suggest_name
from tuneforge.plugin import Check

_UNIQUE = Check("names that differ", lambda names: len(set(names)) == len(names), {"uniqueItems": True})
_MAX_LOSS = torch.finfo(torch.float32).max  # per-sample loss of a NaN output; finite, because JSON has no infinity


@component(api=1)
class ClassTargets(Targets):
    """One class per sample. Stored targets are int64 (n,); with mix-up a loss gets class probabilities, float (b, k).

    The data source checks that there are at least two classes.
    """

    loss = "cross-entropy"
    metrics = ("classification",)
    monitor = "f1_macro"
    monitor_mode = "max"
    primary_metrics = ("accuracy", "precision_macro", "recall_macro", "f1_macro")

    names: tuple[str, ...] = option(help="Names of the classes, in the order of the outputs.", check=_UNIQUE)

    @property
    def num_outputs(self) -> int:
        """Return the number of classes."""
        return len(self.names)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the classes."""
        return self.names

    def encode(self, raw: Any) -> int:
        """Return the index of a class name; a number is converted to a name.

        Raises:
            DataError: No class has that name.
        """
        return _find_class_index(str(raw), self.names)

    def to_predictions(self, outputs: Tensor) -> Tensor:
        """Return the probabilities (b, k) of outputs (b, k)."""
        return outputs.softmax(1)

    def describe(self, output: Tensor) -> dict[str, Any]:
        """Return `class`, its `probability`, and `probabilities` by name; None in place of NaN."""
        probabilities = _softmax(output)
        if not probabilities.numel() or probabilities.isnan().any():
            return {"class": None, "probability": None, "probabilities": dict.fromkeys(self.names)}
        best = int(probabilities.argmax())
        by_name = dict(zip(self.names, probabilities.tolist(), strict=True))
        return {"class": self.names[best], "probability": float(probabilities[best]), "probabilities": by_name}

    def describe_label(self, target: Tensor) -> str:
        """Return the name of the class; for probabilities (k,), each class with its probability."""
        if target.ndim == 0:
            return self.names[int(target)]
        probabilities = zip(self.names, target.tolist(), strict=True)
        return ", ".join(f"{name} {probability:.2f}" for name, probability in probabilities if probability > 0)

    def per_sample_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy (b,), 0 where the prediction is correct."""
        losses = F.cross_entropy(outputs.float(), targets, reduction="none")
        right = outputs.argmax(1) == (targets if targets.ndim == 1 else targets.argmax(1))
        return _replace_nonfinite(torch.where(right & losses.isfinite(), 0.0, losses))

    def group_by_class(self, targets: Tensor) -> dict[str, Tensor]:
        """Return the rows of each class, int64."""
        counts = targets.bincount(minlength=len(self.names)).tolist()
        return dict(zip(self.names, torch.split(targets.argsort(stable=True), counts), strict=True))

    def fit_head(self, features: Tensor, targets: Tensor, *, l2: float | None) -> tuple[Tensor, Tensor]:
        """Fit a logistic regression: minimize the mean cross-entropy + l2 / 2 * |W|^2; the bias has no penalty.

        `ScaledFeatures` scales the features, and that is folded into the result. A class without samples gets weight 0
        and a bias that gives it a probability of at most about 1/n on every sample.

        Args:
            features: (n, f).
            targets: int64 (n,).
            l2: L2 penalty, relative to the mean loss; None is chosen by cross-validation.

        Returns:
            Weight (k, f) and bias (k,), with the dtype and device of `features`.

        Raises:
            DataError: Fewer than two classes occur.
        """
        present, codes = np.unique(targets.cpu().numpy(), return_inverse=True)
        if len(present) < 2:
            raise DataError(
                f"a head cannot be fitted to {len(present)} class(es)",
                why="all samples have the same label",
                fix="give training samples of at least two classes",
            )
        scaled = ScaledFeatures.from_tensor(features)
        if l2 is None:
            scaled, l2 = scale_and_choose(features, codes, cross_validate_logistic)
        rows, offsets = fit_logistic(scaled.values, codes, l2=l2)
        logits = scaled.values @ rows.T + offsets
        weight = np.zeros((self.num_outputs, scaled.values.shape[1]))
        bias = np.full(self.num_outputs, log_sum_exp(logits).min() - math.log(len(logits)))
        weight[present], bias[present] = rows, offsets
        return scaled.unscale((weight, bias), like=features)


@component(api=1)
class MultilabelTargets(Targets):
    """Any number of labels per sample. Stored targets are 0 or 1, float32 (n, k)."""

    loss = "binary-cross-entropy"
    metrics = ("multilabel",)
    monitor = "f1_macro"
    monitor_mode = "max"
    primary_metrics = ("exact_match", "f1_macro", "f1_micro")

    names: tuple[str, ...] = option(help="Names of the labels, in the order of the outputs.", check=_UNIQUE)

    @property
    def num_outputs(self) -> int:
        """Return the number of labels."""
        return len(self.names)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the labels."""
        return self.names

    def encode(self, raw: Any) -> list[float]:
        """Return 1 for each label of a list of names, 0 for the others.

        Raises:
            DataError: It is not a list, or a name is unknown.
        """
        if isinstance(raw, str) or not isinstance(raw, Iterable):
            raise DataError(f"{raw!r} is not a list of labels", fix="give a list of names, which may be empty")
        held = {_find_class_index(str(name), self.names) for name in raw}
        return [float(index in held) for index in range(self.num_outputs)]

    def to_predictions(self, outputs: Tensor) -> Tensor:
        """Return the probabilities (b, k) of outputs (b, k)."""
        return outputs.sigmoid()

    def describe(self, output: Tensor) -> dict[str, Any]:
        """Return the `labels` with probability at least 0.5, and `probabilities` by name; None in place of NaN."""
        probabilities = [
            None if math.isnan(each) else each for each in output.detach().cpu().double().sigmoid().tolist()
        ]
        held = [name for name, each in zip(self.names, probabilities, strict=True) if each is not None and each >= 0.5]
        return {"labels": held, "probabilities": dict(zip(self.names, probabilities, strict=True))}

    def describe_label(self, target: Tensor) -> str:
        """Return the names of the labels of a sample, or "none"."""
        held = [name for name, value in zip(self.names, target.tolist(), strict=True) if value >= 0.5]
        return ", ".join(held) or "none"

    def per_sample_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the binary cross-entropy summed over labels (b,), 0 where all predictions are correct."""
        losses = F.binary_cross_entropy_with_logits(outputs.float(), targets.float(), reduction="none").sum(1)
        right = ((outputs >= 0) == (targets >= 0.5)).all(1)
        return _replace_nonfinite(torch.where(right & losses.isfinite(), 0.0, losses))

    def fit_head(self, features: Tensor, targets: Tensor, *, l2: float | None) -> tuple[Tensor, Tensor]:
        """Fit a logistic regression per label: minimize the cross-entropy + l2 / 2 * |w|^2; biases have no penalty.

        `ScaledFeatures` scales the features, and that is folded into the result. A label that all samples have, or
        none, gets weight 0 and the bias of its smoothed frequency, (count + 1/2) / (n + 1).

        Args:
            features: (n, f).
            targets: 0 or 1, float (n, k).
            l2: L2 penalty, relative to the mean loss; None is 1e-3.

        Returns:
            Weight (k, f) and bias (k,), with the dtype and device of `features`.
        """
        scaled = ScaledFeatures.from_tensor(features)
        held = targets.cpu().numpy() >= 0.5
        weight, bias = np.zeros((self.num_outputs, scaled.values.shape[1])), np.zeros(self.num_outputs)
        for index in range(self.num_outputs):
            count = int(held[:, index].sum())
            if 0 < count < len(held):
                rows, offsets = fit_binary(scaled.values, held[:, index], l2=l2 or 1e-3)
                weight[index], bias[index] = rows[0], offsets[0]
            else:
                bias[index] = math.log((count + 0.5) / (len(held) - count + 0.5))
        return scaled.unscale((weight, bias), like=features)


@component(api=1)
class RegressionTargets(Targets):
    """Numbers with units (regression). Stored targets are (number - mean) / scale, float32 (n,) or (n, k)."""

    loss = "mse"
    metrics = ("regression",)
    monitor = "mae"
    monitor_mode = "min"
    primary_metrics = ("mae", "rmse", "r2")

    names: tuple[str, ...] = option(
        default=("value",), help="Names of the numbers, in the order of the outputs.", check=_UNIQUE
    )
    units: tuple[str, ...] = option(default=("",), help="Unit of each, or one for all.")
    means: tuple[float, ...] = option(default=(0.0,), help="Mean that was subtracted from each, or one for all.")
    scales: tuple[float, ...] = option(
        default=(1.0,), help="Standard deviation by which each was divided, or one for all.", check=POSITIVE_NUMBERS
    )

    def __attrs_post_init__(self) -> None:
        for name, values in (("units", self.units), ("means", self.means), ("scales", self.scales)):
            if len(values) not in (1, len(self.names)):
                raise OptionError(
                    f"{len(values)} {name} for {len(self.names)} number(s)",
                    where=", ".join(self.names),
                    fix="give one each",
                )

    @property
    def num_outputs(self) -> int:
        """Return the number of outputs per sample."""
        return len(self.names)

    def encode(self, raw: Any) -> float | list[float]:
        """Return the standardized number, or a list of several from a mapping by name or a list in order.

        Raises:
            DataError: A number is missing, invalid or not finite.
        """
        if isinstance(raw, Mapping):
            raw = [raw.get(name) for name in self.names]
        given = list(raw) if isinstance(raw, (list, tuple, np.ndarray)) else [raw]
        if len(given) != self.num_outputs:
            raise DataError(
                f"{len(given)} number(s) for {self.num_outputs}", where=", ".join(self.names), fix="give one each"
            )
        numbers = [_parse_number(value, name) for name, value in zip(self.names, given, strict=True)]
        scaled = [
            (each - mean) / scale for each, mean, scale in zip(numbers, *self._get_means_and_scales(), strict=True)
        ]
        return scaled if self.num_outputs > 1 else scaled[0]

    def to_predictions(self, outputs: Tensor) -> Tensor:
        """Return the predictions in original units (b, k) of outputs (b, k)."""
        means, scales = (torch.tensor(each, dtype=outputs.dtype) for each in self._get_means_and_scales())
        return outputs * scales.to(outputs.device) + means.to(outputs.device)

    def describe(self, output: Tensor) -> dict[str, Any]:
        """Return `value` and `unit`, or `values` and `units` by name; None in place of NaN or Inf."""
        values = [each if math.isfinite(each) else None for each in self._unscale(output)]
        if self.num_outputs == 1:
            return {"value": values[0], "unit": self.units[0]}
        named_units = dict(zip(self.names, _repeat_to_size(self.units, self.num_outputs), strict=True))
        return {"values": dict(zip(self.names, values, strict=True)), "units": named_units}

    def describe_label(self, target: Tensor) -> str:
        """Return the number with its unit; several also with their names."""
        texts = [
            f"{value:.6g} {unit}".strip()
            for value, unit in zip(self._unscale(target), _repeat_to_size(self.units, self.num_outputs), strict=True)
        ]
        return (
            texts[0] if self.num_outputs == 1 else ", ".join(f"{a} {b}" for a, b in zip(self.names, texts, strict=True))
        )

    def per_sample_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the absolute error in standardized units, the mean over outputs (b,)."""
        outputs, targets = to_columns(outputs, targets)
        return _replace_nonfinite((outputs - targets).abs().mean(1))

    def fit_head(self, features: Tensor, targets: Tensor, *, l2: float | None) -> tuple[Tensor, Tensor]:
        """Fit a ridge regression: minimize the mean squared error + l2 / 2 * |w|^2; biases have no penalty.

        `ScaledFeatures` scales the features, and that is folded into the result. Solved in closed form:
        (X'X / n + l2 / 2) w = X'y / n.

        Args:
            features: (n, f).
            targets: Standardized, float (n,) or (n, k).
            l2: L2 penalty, relative to the mean loss; None is chosen by the leave-one-out error.

        Returns:
            Weight (k, f) and bias (k,), with the dtype and device of `features`.
        """
        scaled, numbers = ScaledFeatures.from_tensor(features), targets.cpu().double().numpy().reshape(len(targets), -1)
        if l2 is None:
            scaled, l2 = scale_and_choose(features, numbers, leave_one_out_ridge)
        return scaled.unscale(fit_ridge(scaled.values, numbers, l2=l2), like=features)

    def _get_means_and_scales(self) -> tuple[Sequence[float], Sequence[float]]:
        return _repeat_to_size(self.means, self.num_outputs), _repeat_to_size(self.scales, self.num_outputs)

    def _unscale(self, numbers: Tensor) -> list[float]:
        """Return numbers (k,) or () in original units."""
        flat = numbers.detach().cpu().double().reshape(-1).tolist()
        return [each * scale + mean for each, mean, scale in zip(flat, *self._get_means_and_scales(), strict=True)]


def to_columns(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets, both as (b, k), so that (b, 1) - (b,) does not broadcast to (b, b).

    Raises:
        DataError: Their shapes differ.
    """
    columns, target_columns = (each.flatten(1) if each.ndim > 1 else each.reshape(-1, 1) for each in (outputs, targets))
    if columns.shape != target_columns.shape:
        raise DataError(
            f"outputs {tuple(outputs.shape)} do not match targets {tuple(targets.shape)}",
            why="each sample needs one output per target",
            fix="give the head as many outputs as there are targets (--adapt head does)",
        )
    return columns, target_columns


def compute_mean_and_scale(values: NDArray[Any], *, tolerance: float = 1e-12) -> tuple[Doubles, Doubles]:
    """Return the mean and the standard deviation over the first axis, in float64.

    Args:
        values: (n,) or (n, f).
        tolerance: A standard deviation of at most this fraction of the mean counts as constant and becomes 1.
    """
    doubles = values.astype(np.float64, copy=False)
    mean, scale = np.asarray(doubles.mean(0)), np.asarray(doubles.std(0))
    return mean, np.where(scale > tolerance * np.abs(mean), scale, 1.0)


def _find_class_index(name: str, names: Sequence[str]) -> int:
    try:
        return names.index(name)
    except ValueError:
        raise DataError(
            f"there is no class '{name}'", why="it is not among the classes", fix=suggest_name(name, names)
        ) from None


def _parse_number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{value!r} is not a finite number", where=f"'{name}'", fix="give a number such as 1.5")
    return number


def _repeat_to_size(values: Sequence[Any], size: int) -> Sequence[Any]:
    return values if len(values) == size else [values[0]] * size


def _softmax(output: Tensor) -> Tensor:
    return output.detach().cpu().double().softmax(0)


def _replace_nonfinite(losses: Tensor) -> Tensor:
    return losses.nan_to_num(nan=_MAX_LOSS, posinf=_MAX_LOSS)
