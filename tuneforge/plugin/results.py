"""What a strategy is told: the task before it begins, and the answer to each of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from tuneforge.plugin.serialization import (
    KEEP_KEY_ORDER,
    mapping_field,
    metrics_field,
    register_serializable,
    sort_keys,
)


def to_name_tuple(values: Iterable[str]) -> tuple[str, ...]:
    """Names as a tuple, whatever they come in."""
    return tuple(values)


def _to_step_tuple(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


@register_serializable
@attrs.frozen
class StrategyStepResult:
    """The answer to a step that changed the weights.

    Args:
        step_name: The step's name.
        reason: Why it ended, in a sentence.
        epochs: Epochs trained.
        steps: Optimizer steps taken.
        best_epoch: Counted from 1 within the step; 0 where there is none.
        train: Figures of training: `loss` of the last epoch.
        val: Every figure of the validation split after the step, nested as the metrics gave it, sorted by name.
        history: One entry an epoch: `epoch`, `train`, `val` (single numbers only).
        num_trainable: Number of parameters that trained.
        num_frozen: Number of parameters that did not; they are proved unchanged to the bit.
        never_updated: Names of tensors that had a rate and never received a gradient.
        selection: What the step chose among candidates (`WeightAverage`'s weight).
        skipped_steps: Optimizer steps that were not applied, because a loss or a gradient was no number.
        num_augmented_copies: Fixed augmented views that each training sample was seen in, where features were kept;
            else 0.
    """

    step_name: str
    reason: str = ""
    epochs: int = 0
    steps: int = 0
    best_epoch: int = 0
    train: Mapping[str, Any] = metrics_field()
    val: Mapping[str, Any] = metrics_field()
    history: tuple[Mapping[str, Any], ...] = attrs.field(default=(), converter=sort_keys)
    num_trainable: int = 0
    num_frozen: int = 0
    never_updated: tuple[str, ...] = attrs.field(default=(), converter=to_name_tuple)
    selection: Mapping[str, Any] = metrics_field()
    skipped_steps: tuple[int, ...] = attrs.field(default=(), converter=_to_step_tuple)
    num_augmented_copies: int = 0


@register_serializable
@attrs.frozen
class Diagnostics:
    """The answer to a `Diagnosis`.

    Args:
        step_name: The step's name.
        values: By layer group or tensor name; for rates, by the rate.
    """

    step_name: str
    values: Mapping[Any, float] = mapping_field(**KEEP_KEY_ORDER)


AnyStrategyStepResult = StrategyStepResult | Diagnostics


@register_serializable
@attrs.frozen
class LayerGroupInfo:
    """A layer group as a strategy sees it.

    Args:
        name: As selectors write it.
        num_parameters: Numbers in its tensors.
        parameter_names: Names of its parameters.
    """

    name: str
    num_parameters: int
    parameter_names: tuple[str, ...] = attrs.field(converter=to_name_tuple)


def _to_group_tuple(values: Iterable[LayerGroupInfo]) -> tuple[LayerGroupInfo, ...]:
    return tuple(values)


@register_serializable
@attrs.frozen
class TaskInfo:
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
        sample_groups: Samples of each named part of the training split, which `Phase(mixture_weights=...)` may ask for.
    """

    groups: tuple[LayerGroupInfo, ...] = attrs.field(converter=_to_group_tuple)
    classes: tuple[str, ...] = attrs.field(converter=to_name_tuple)
    num_train: int
    num_val: int
    batch_size: int
    device: str
    seed: int
    monitor: str
    monitor_mode: str
    old_classes: tuple[str, ...] = attrs.field(default=(), converter=to_name_tuple)
    budget: Mapping[str, float] = mapping_field()
    sample_groups: Mapping[str, int] = mapping_field()

    @property
    def backbone(self) -> tuple[LayerGroupInfo, ...]:
        """All groups but the head, from the input up."""
        return self.groups[:-1]

    @property
    def head(self) -> LayerGroupInfo:
        """The group nearest to the answer."""
        return self.groups[-1]

    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training split; a last sample alone joins the step before it."""
        joined = self.num_train > self.batch_size and self.num_train % self.batch_size == 1
        return -(-self.num_train // self.batch_size) - joined
