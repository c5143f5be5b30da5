"""Losses: cross-entropy, binary cross-entropy, mean squared error.

Each calls `run.forward(batch.inputs)` and returns the mean loss over the batch and the outputs. Where samples have
weights w, from the phase or from an option of the loss, the loss is sum(w * loss) / b: weights are scaled to mean 1
over the training split, so that they do not change the scale of the loss. (torch's weighted mean divides by the sum of
the weights in the batch, so the effective weight of a class would vary from batch to batch.)

Shapes: b samples in a batch, k outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tuneforge import DataError, OptionError, UnknownNameError, component, hookimpl, option
from tuneforge.builtin.checks import FRACTION_OR_ZERO
from tuneforge.builtin.targets import to_columns
from tuneforge.errors import suggest_name
from tuneforge.plugin import Check

if TYPE_CHECKING:
    from tuneforge import Batch, Run

_FACTORS = Check("numbers of at least 0", lambda factors: all(value >= 0 for value in factors.values()))


@component(api=1)
class CrossEntropy:
    """Cross-entropy over classes; without weights, bit-identical to torch's `F.cross_entropy`.

    Label smoothing distributes the fraction e of each target over all k classes (Szegedy et al. 2016, 1512.00567).
    """

    label_smoothing: float = option(
        default=0.0, help="Fraction of each target that is distributed over all classes.", check=FRACTION_OR_ZERO
    )
    class_weights: dict[str, float] = option(
        default={},
        help="Loss weights by class name, 1 for the others; scaled to mean 1 over the training split.",
        check=_FACTORS,
    )

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss and the outputs (b, k); targets are int64 (b,), or class probabilities, float (b, k).

        Raises:
            DataError: Outputs or targets have the wrong shape or dtype, or a target is out of range.
            UnknownNameError: A weight names an unknown class.
            OptionError: All classes of the training split have weight 0.
        """
        outputs, targets = run.forward(batch.inputs), batch.targets
        _check_classes(outputs, targets, run.data.targets.num_outputs)
        weights = _multiply_weights(batch.weights, self._get_sample_weights(run, targets))
        try:
            if weights is None:
                return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing), outputs
            losses = F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing, reduction="none")
        except IndexError:  # a target is out of range; checking the range before would synchronize with the device
            raise _class_range_error(targets, outputs.shape[1]) from None
        return (losses * weights).mean(), outputs

    def _get_sample_weights(self, run: Run, targets: Tensor) -> Tensor | None:
        """Return the weight of each sample (b,) by its class, or None without class weights."""
        if not self.class_weights:
            return None
        state = run.state(self)
        if "factors" not in state:
            raw = _factors_by_label(self.class_weights, run.data.targets.labels, option="class-weights")
            mean = raw[run.data.train.targets].mean()
            if mean == 0:
                raise OptionError("every class of the training split has weight 0", where="--loss.class-weights")
            state["factors"] = raw / mean
        factors: Tensor = state["factors"].to(targets.device)
        return factors[targets] if targets.ndim == 1 else targets @ factors


@component(api=1)
class BinaryCrossEntropy:
    """Binary cross-entropy of each label, the mean over labels and samples."""

    label_smoothing: float = option(
        default=0.0, help="How far targets move from 0 and 1 towards 1/2.", check=FRACTION_OR_ZERO
    )
    pos_weights: dict[str, float] = option(
        default={}, help="Loss weights of positive targets by label name; 1 for the others.", check=_FACTORS
    )

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss and the outputs (b, k); targets are 0 or 1, float (b, k).

        Raises:
            DataError: Outputs or targets have the wrong shape or dtype.
            UnknownNameError: A weight names an unknown label.
        """
        outputs = run.forward(batch.inputs)
        logits, targets = to_columns(outputs, _require_float_targets(batch.targets))
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2 if self.label_smoothing else targets
        factors = self._get_pos_weight(run)
        pos_weight = None if factors is None else factors.to(outputs.device)
        if batch.weights is None:
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight), outputs
        losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=pos_weight, reduction="none")
        return (losses.mean(1) * batch.weights).mean(), outputs

    def _get_pos_weight(self, run: Run) -> Tensor | None:
        if not self.pos_weights:
            return None
        state = run.state(self)
        if "factors" not in state:
            state["factors"] = _factors_by_label(self.pos_weights, run.data.targets.labels, option="pos-weights")
        factors: Tensor = state["factors"]
        return factors


@component(api=1)
class MSE:
    """Mean squared error of the standardized targets, the mean over outputs and samples."""

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss and the outputs (b, k); targets are float (b,) where k is 1, or (b, k).

        Raises:
            DataError: Outputs or targets have the wrong shape or dtype.
        """
        outputs = run.forward(batch.inputs)
        columns, targets = to_columns(outputs, _require_float_targets(batch.targets))
        if batch.weights is None:
            return F.mse_loss(columns, targets), outputs
        return ((columns - targets).square().mean(1) * batch.weights).mean(), outputs


def _check_classes(outputs: Tensor, targets: Tensor, size: int) -> None:
    if outputs.ndim != 2 or outputs.shape[1] != size:
        raise DataError(
            f"the model gives outputs {tuple(outputs.shape)} for {size} classes",
            where="loss cross-entropy",
            why="cross-entropy needs one output per class",
            fix="give the head that many outputs (--adapt head does)",
        )
    are_probabilities = targets.shape == outputs.shape and targets.is_floating_point()
    if not are_probabilities and (targets.shape != outputs.shape[:1] or targets.dtype != torch.int64):
        raise DataError(
            f"targets are {str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}",
            where="loss cross-entropy",
            why=f"it takes class indices, int64 ({len(outputs)},), or probabilities, float {tuple(outputs.shape)}",
            fix="store indices as targets.long(); use --loss mse for numbers, binary-cross-entropy for label sets",
        )


def _class_range_error(targets: Tensor, size: int) -> DataError:
    return DataError(
        f"class indices range from {int(targets.min())} to {int(targets.max())}, and there are {size} classes",
        where="loss cross-entropy",
        why=f"an index must be from 0 to {size - 1}",
        fix="name every class in the data's targets, or number the classes from 0",
    )


def _require_float_targets(targets: Tensor) -> Tensor:
    if not targets.is_floating_point():
        raise DataError(
            f"targets are {str(targets.dtype).removeprefix('torch.')}, and the loss needs floats",
            fix="store targets.float(); for class indices use --loss cross-entropy",
        )
    return targets


def _factors_by_label(factors: Mapping[str, float], labels: tuple[str, ...], *, option: str) -> Tensor:
    """Return the weight of each label (k,), 1 where none is given.

    Raises:
        UnknownNameError: A weight names an unknown label.
    """
    for name in factors:
        if name not in labels:
            raise UnknownNameError(
                f"there is no class '{name}'", where=f"--loss.{option}", fix=suggest_name(name, labels)
            )
    return torch.tensor([factors.get(label, 1.0) for label in labels])


def _multiply_weights(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one * other
