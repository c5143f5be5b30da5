"""The steps that a strategy yields: immutable plain data that JSON stores without loss."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import attrs

from tuneforge.errors import UsageError
from tuneforge.plugin.serialization import KEEP_KEY_ORDER, mapping_field, register_serializable, to_plain_data


@register_serializable
@attrs.frozen
class ComponentSpec:
    """A component by name, with its options: `ComponentSpec("one-cycle", {"pct_start": 0.3})`.

    Args:
        name: The name in the registry.
        options: Values by option name; the others have their defaults.
    """

    name: str
    options: Mapping[str, Any] = mapping_field()


def use(name: str, **options: Any) -> ComponentSpec:
    """Refer to a component by name: `Phase(..., schedule=use("one-cycle", pct_start=0.3))`."""
    return ComponentSpec(name, options)


def _to_spec(value: str | ComponentSpec | None) -> ComponentSpec | None:
    return ComponentSpec(value) if isinstance(value, str) else value


def _to_name_tuple(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


def _to_number_tuple(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(values)


def _to_selectors(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@register_serializable
@attrs.frozen
class Phase:
    """Train the parameters that selectors match.

    Args:
        name: A name that is unique within the run; `WeightAverage` and the report refer to it. `"start"` is reserved.
        train: Selectors of the trained parameters: `"head"`, `"all"`, `"norms"`, `"biases"`, a layer group, a slice of
            groups such as `"groups[-2:]"`, a module path, a glob over parameter names, or `"re:..."`. Several are
            joined in order; one that starts with `!` removes matches. All other parameters are frozen.
        epochs: Passes over the training split; give this or `steps`.
        steps: Optimizer steps, where an epoch is too coarse.
        lr: Peak learning rate; with `layer_decay`, that of the last layer group.
        lr_scales: Factors on `lr` by selector, at least 0; a later one overrides an earlier one.
        layer_decay: Factor on `lr` from each layer group to the one below it, in (0, 1].
        schedule: The learning rate schedule of this phase; None is that of the run.
        optimizer: The optimizer; None continues with that of the run, and another name starts a new one.
        weight_decay: Weight decay of weight matrices; biases and norms are not decayed. None is the default of the
            optimizer.
        patience: Epochs without improvement after which the phase stops; None disables early stopping.
        monitor: The validation metric of early stopping and best weights; None is the default of the targets.
        monitor_mode: `"max"` or `"min"`, if tuneforge does not know whether a higher `monitor` is better.
        min_delta: The least change of `monitor` that counts as an improvement, absolute.
        restore_best: End with the weights of the best epoch instead of the last.
        batchnorm_stats: `"frozen"`: BatchNorm layers with a frozen parameter keep their running statistics;
            `"updating"`: they keep updating them; `"all-frozen"`: every BatchNorm layer keeps its running statistics
            and normalizes with them, for batches that are small or unlike the pretraining.
        class_weights: Factors on the loss by class name, `"balanced"`, or None.
        sampling: Sampling weights by class name, `"balanced"`, or None for uniform sampling without replacement.
        mixture_weights: Fraction of an epoch that is drawn from each sample group (`Data.sample_groups`); the rest is
            drawn from samples in none of the named groups, and the number of draws per epoch does not change. Not
            together with `sampling`.
        why: The reason for this step, which is printed and stored.
    """

    name: str
    train: tuple[str, ...] = attrs.field(default=("all",), converter=_to_selectors, kw_only=True)
    epochs: int | None = attrs.field(default=None, kw_only=True)
    steps: int | None = attrs.field(default=None, kw_only=True)
    lr: float = attrs.field(default=1e-3, kw_only=True)
    lr_scales: Mapping[str, float] = attrs.field(
        factory=dict, converter=to_plain_data, kw_only=True, metadata=KEEP_KEY_ORDER
    )
    layer_decay: float = attrs.field(default=1.0, kw_only=True)
    schedule: ComponentSpec | None = attrs.field(default=None, converter=_to_spec, kw_only=True)
    optimizer: ComponentSpec | None = attrs.field(default=None, converter=_to_spec, kw_only=True)
    weight_decay: float | None = attrs.field(default=None, kw_only=True)
    patience: int | None = attrs.field(default=None, kw_only=True)
    monitor: str | None = attrs.field(default=None, kw_only=True)
    monitor_mode: str | None = attrs.field(default=None, kw_only=True)
    min_delta: float = attrs.field(default=0.0, kw_only=True)
    restore_best: bool = attrs.field(default=False, kw_only=True)
    batchnorm_stats: str = attrs.field(default="frozen", kw_only=True)
    class_weights: Mapping[str, float] | str | None = attrs.field(default=None, converter=to_plain_data, kw_only=True)
    sampling: Mapping[str, float] | str | None = attrs.field(default=None, converter=to_plain_data, kw_only=True)
    mixture_weights: Mapping[str, float] | None = attrs.field(default=None, converter=to_plain_data, kw_only=True)
    why: str = attrs.field(default="", kw_only=True)

    def __attrs_post_init__(self) -> None:
        _require(self, (self.epochs is None) != (self.steps is None), "give epochs or steps, one of the two")
        for name in ("epochs", "steps", "patience"):
            _require_number(self, name, whole=True, low=1)
        _require_number(self, "lr", low=0.0)
        _require(self, self.lr > 0, "lr must be greater than 0")
        _require_number(self, "layer_decay", low=0.0, high=1.0)
        _require(self, self.layer_decay > 0, "layer_decay must be greater than 0")
        _require_number(self, "weight_decay", low=0.0)
        _require_number(self, "min_delta", low=0.0)
        for name in ("lr_scales", "class_weights", "sampling", "mixture_weights"):
            _require_nonnegative_mapping(self, name)
        _require(
            self,
            self.mixture_weights is None or self.sampling is None,
            "give mixture_weights or sampling, one of the two",
        )
        _require(
            self,
            sum((self.mixture_weights or {}).values()) <= 1 + 1e-9,
            "the shares of mixture_weights must sum to at most 1",
        )
        _require(
            self, isinstance(self.restore_best, bool), f"restore_best must be True or False, not {self.restore_best!r}"
        )
        _require(
            self,
            self.batchnorm_stats in ("frozen", "all-frozen", "updating"),
            f"batchnorm_stats must be 'frozen', 'all-frozen' or 'updating', not {self.batchnorm_stats!r}",
        )
        _require_monitor_mode(self)


@register_serializable
@attrs.frozen
class HeadFit:
    """Solve the head to convergence on frozen features and load it (a linear probe).

    Args:
        name: Unique within the run.
        l2: Strength of the L2 penalty on the weights of the head, relative to the mean loss; None is chosen by
            cross-validation on the training samples, and is 1e-3 for several labels per sample.
        why: The reason for this step, which is printed and stored.
    """

    name: str
    l2: float | None = attrs.field(default=None, kw_only=True)
    why: str = attrs.field(default="", kw_only=True)

    def __attrs_post_init__(self) -> None:
        _require_number(self, "l2", low=0.0)
        _require(self, self.l2 is None or self.l2 > 0, "l2 must be greater than 0")


@register_serializable
@attrs.frozen
class Diagnosis:
    """Measure without training: the state of the run is bit-identical before and after.

    Args:
        name: Unique within the run.
        measure: `"gradients"`: the ratio of gradient norm to weight norm; `"features"`: the shift of the output of
            each layer group between training and validation; `"lrs"`: the loss after one optimizer step at each of a
            range of learning rates.
        train: For gradients and lrs, the selectors of the parameters that would train.
        batches: The number of training batches to use.
        by: For gradients, one value per layer `"group"` or one per `"tensor"`.
        why: The reason for this step, which is printed and stored.
    """

    name: str
    measure: str = attrs.field(default="gradients", kw_only=True)
    train: tuple[str, ...] = attrs.field(default=("all",), converter=_to_selectors, kw_only=True)
    batches: int = attrs.field(default=5, kw_only=True)
    by: str = attrs.field(default="group", kw_only=True)
    why: str = attrs.field(default="", kw_only=True)

    def __attrs_post_init__(self) -> None:
        known = ("gradients", "features", "lrs")
        _require(self, self.measure in known, f"measure must be one of {', '.join(known)}, not {self.measure!r}")
        _require(self, self.batches >= 1, f"batches must be at least 1, not {self.batches}")
        _require(self, self.by in ("group", "tensor"), f"by must be 'group' or 'tensor', not {self.by!r}")


@register_serializable
@attrs.frozen
class WeightAverage:
    """Interpolate between snapshots of the weights and keep the best on validation (WiSE-FT, model soups).

    With one snapshot, its weights are restored.

    Args:
        name: Unique within the run.
        snapshots: `"start"`, or names of earlier steps, whose final weights are used.
        weights: With two snapshots, candidate weights of the second one; any other number of snapshots is averaged.
        monitor: The validation metric that decides; None is the default of the targets.
        monitor_mode: `"max"` or `"min"`, where tuneforge does not know whether more of `monitor` is better.
        why: The reason for this step, which is printed and stored.
    """

    name: str
    snapshots: tuple[str, ...] = attrs.field(converter=_to_name_tuple, kw_only=True)
    weights: tuple[float, ...] = attrs.field(
        default=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), converter=_to_number_tuple, kw_only=True
    )
    monitor: str | None = attrs.field(default=None, kw_only=True)
    monitor_mode: str | None = attrs.field(default=None, kw_only=True)
    why: str = attrs.field(default="", kw_only=True)

    def __attrs_post_init__(self) -> None:
        _require_monitor_mode(self)
        _require(self, len(self.snapshots) >= 1, "name at least one snapshot")
        _require(self, bool(self.weights), "give at least one weight")
        _require(self, all(0 <= weight <= 1 for weight in self.weights), "weights must lie from 0 to 1")


StrategyStep = Phase | HeadFit | Diagnosis | WeightAverage
StrategySteps = Generator[StrategyStep, Any, None]
"""The type of a strategy that is a generator: it yields steps, and each `yield` returns the result of the step."""


def _require_number(step: Any, name: str, *, low: float, high: float = math.inf, whole: bool = False) -> None:
    value = getattr(step, name)
    if value is None:
        return
    kind = int if whole else (int, float)
    holds = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    _require(step, holds, f"{name} must be {'a whole number' if whole else 'a number'} of {span}, not {value!r}")


def _require_nonnegative_mapping(step: Any, name: str) -> None:
    factors = getattr(step, name)
    words = name in ("class_weights", "sampling") and isinstance(factors, str)  # the engine knows which
    _require(step, factors is None or words or isinstance(factors, Mapping), f"{name} must be a table, not {factors!r}")
    if not isinstance(factors, Mapping) or not factors:
        return
    known = [value for value in factors.values() if isinstance(value, (int, float))]
    holds = len(known) == len(factors) and all(math.isfinite(value) and value >= 0 for value in known)
    _require(step, holds, f"{name} must be numbers of at least 0, not {dict(factors)}")


def _require_monitor_mode(step: Any) -> None:
    mode = step.monitor_mode
    _require(step, mode in (None, "max", "min"), f"monitor_mode must be 'max' or 'min', not {mode!r}")


def _require(step: Any, holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(f"{type(step).__name__} '{step.name}': {message}", where="a step of the strategy")
