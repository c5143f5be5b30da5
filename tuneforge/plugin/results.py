"""What a strategy is told: the brief before it begins, and the answer to each of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from tuneforge.plugin.serialization import KEEPS_ORDER, data, figures, in_order, kind


def _names(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


def _steps(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


@kind
@attrs.frozen
class Report:
    """The answer to a step that changed the weights.

    Args:
        step: The step's name.
        reason: Why it ended, in a sentence.
        epochs: Epochs trained.
        steps: Optimizer steps taken.
        best_epoch: Counted from 1 within the step; 0 where there is none.
        train: Figures of training: `loss` of the last epoch.
        val: Every figure of the validation split after the step, nested as the metrics gave it, sorted by name.
        history: One entry an epoch: `epoch`, `train`, `val` (single numbers only).
        trained: Number of parameters that trained.
        frozen: Number of parameters that did not; they are proved unchanged to the bit.
        unmoved: Names of tensors that had a rate and never received a gradient.
        chosen: What the step chose among candidates (`Blend`'s weight).
        left_out: Optimizer steps that were not applied, because a loss or a gradient was no number.
        views: Fixed augmented views that each training sample was seen in, where features were kept; else 0.
    """

    step: str
    reason: str = ""
    epochs: int = 0
    steps: int = 0
    best_epoch: int = 0
    train: Mapping[str, Any] = figures()
    val: Mapping[str, Any] = figures()
    history: tuple[Mapping[str, Any], ...] = attrs.field(default=(), converter=in_order)
    trained: int = 0
    frozen: int = 0
    unmoved: tuple[str, ...] = attrs.field(default=(), converter=_names)
    chosen: Mapping[str, Any] = figures()
    left_out: tuple[int, ...] = attrs.field(default=(), converter=_steps)
    views: int = 0


@kind
@attrs.frozen
class Readings:
    """The answer to a `Probe`.

    Args:
        step: The probe's name.
        values: By layer group or tensor name; for rates, by the rate.
    """

    step: str
    values: Mapping[Any, float] = data(**KEEPS_ORDER)


Answer = Report | Readings


@kind
@attrs.frozen
class GroupInfo:
    """A layer group as a strategy sees it.

    Args:
        name: As selectors write it.
        num_parameters: Numbers in its tensors.
        tensors: Names of its parameters.
    """

    name: str
    num_parameters: int
    tensors: tuple[str, ...] = attrs.field(converter=_names)


def _infos(values: Iterable[GroupInfo]) -> tuple[GroupInfo, ...]:
    return tuple(values)


@kind
@attrs.frozen
class Brief:
    """All that a strategy is told: never the live model, never the test split.

    Args:
        groups: Layer groups from the input to the answer; the last is the head.
        classes: Names of the classes; empty where the targets have none.
        num_train: Samples of the training split.
        num_val: Samples of the validation split.
        batch_size: Samples an optimizer step.
        device: Kind of device: `cpu`, `cuda`, ...
        seed: The run's.
        monitor: The validation figure that the targets are judged by, and `"max"` or `"min"`.
        monitor_mode: Whether more of it is better.
        old_classes: Classes whose head rows came with the model.
        budget: What the run may spend, all of it still there: `{"seconds": 60.0}`, `{"epochs": 20}` or
            `{"steps": 500}`; empty where there is no limit.
        pools: Samples of each named part of the training split, which `Phase(mix=...)` may ask for.
    """

    groups: tuple[GroupInfo, ...] = attrs.field(converter=_infos)
    classes: tuple[str, ...] = attrs.field(converter=_names)
    num_train: int
    num_val: int
    batch_size: int
    device: str
    seed: int
    monitor: str
    monitor_mode: str
    old_classes: tuple[str, ...] = attrs.field(default=(), converter=_names)
    budget: Mapping[str, float] = data()
    pools: Mapping[str, int] = data()

    @property
    def backbone(self) -> tuple[GroupInfo, ...]:
        """All groups but the head, from the input up."""
        return self.groups[:-1]

    @property
    def head(self) -> GroupInfo:
        """The group nearest to the answer."""
        return self.groups[-1]

    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training split; a last sample alone joins the step before it."""
        joined = self.num_train > self.batch_size and self.num_train % self.batch_size == 1
        return -(-self.num_train // self.batch_size) - joined
