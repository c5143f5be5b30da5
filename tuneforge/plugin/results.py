"""What a strategy receives: the task at its start, and the result of each of its steps."""

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
    """Return names as a tuple."""
    return tuple(values)


def _to_step_tuple(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


@register_serializable
@attrs.frozen
class StrategyStepResult:
    """The result of a strategy step that changed the weights.

    Args:
        step_name: The name of the step.
        reason: Why the step ended, in a sentence.
        epochs: The number of epochs.
        steps: The number of optimizer steps.
        best_epoch: The best epoch, counted from 1 within the step; 0 if there is none.
        train: Training metrics: the `loss` of the last epoch.
        val: All validation metrics after the step, sorted by name.
        history: One entry per epoch: `epoch`, `train`, `val` (scalars only).
        num_trainable: The number of trainable parameters.
        num_frozen: The number of frozen parameters; they were verified to be bit-identical.
        never_updated: Names of tensors that had a learning rate and never received a gradient.
        selection: What the step selected among candidates (the weight of `WeightAverage`).
        skipped_steps: Optimizer steps that were skipped because a loss or gradient was NaN or Inf.
        num_augmented_copies: Cached augmented copies per training sample if features were cached, else 0.
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
    """The result of a `Diagnosis`.

    Args:
        step_name: The name of the step.
        values: Values by layer group or tensor name; for `"lrs"`, losses by learning rate.
    """

    step_name: str
    values: Mapping[Any, float] = mapping_field(**KEEP_KEY_ORDER)


AnyStrategyStepResult = StrategyStepResult | Diagnostics


@register_serializable
@attrs.frozen
class LayerGroupInfo:
    """A layer group as a strategy sees it.

    Args:
        name: The name that selectors use.
        num_parameters: The number of its parameters.
        parameter_names: The names of its parameter tensors.
    """

    name: str
    num_parameters: int
    parameter_names: tuple[str, ...] = attrs.field(converter=to_name_tuple)


def _to_group_tuple(values: Iterable[LayerGroupInfo]) -> tuple[LayerGroupInfo, ...]:
    return tuple(values)


@register_serializable
@attrs.frozen
class TaskInfo:
    """What a strategy knows of the task; it never gets the model or the test split.

    Args:
        groups: Layer groups from the input to the output; the last is the head.
        classes: Names of the classes; empty if the targets have none.
        num_train: The number of training samples.
        num_val: The number of validation samples.
        batch_size: Samples per optimizer step.
        device: The device type: `cpu`, `cuda`, ...
        seed: The seed of the run.
        monitor: The validation metric that decides, by default that of the targets.
        monitor_mode: `"max"` if higher is better, or `"min"`.
        old_classes: Classes that the head of the pretrained model already has.
        budget: The budget of the whole run: `{"seconds": 60.0}`, `{"epochs": 20}` or `{"steps": 500}`; empty without
            limit.
        pretrained: False where the model has no pretrained weights.
        can_fit_head: True where `HeadFit` can solve the head.
        sample_groups: The number of samples of each sample group, for `Phase(mixture_weights=...)`.
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
    pretrained: bool = True
    can_fit_head: bool = False
    budget: Mapping[str, float] = mapping_field()
    sample_groups: Mapping[str, int] = mapping_field()

    @property
    def backbone(self) -> tuple[LayerGroupInfo, ...]:
        """All groups but the head, from the input on."""
        return self.groups[:-1]

    @property
    def head(self) -> LayerGroupInfo:
        """The last group."""
        return self.groups[-1]

    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of one epoch; a last batch of one sample is merged into the batch before it."""
        joined = self.num_train > self.batch_size and self.num_train % self.batch_size == 1
        return -(-self.num_train // self.batch_size) - joined
