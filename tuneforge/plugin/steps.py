"""What a strategy may ask for and what it is answered: plain frozen data that survives JSON without loss."""

from __future__ import annotations

import copyreg
import json
import math
from collections.abc import Generator, Iterable, Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

import attrs

from tuneforge.errors import UsageError


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


# So that a step or a `Use` can be copied and sent to another process, as scikit-learn does with an estimator's options.
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


def plain(value: Any) -> Any:
    """Read-only plain data: sequences become tuples, mappings read-only, paths text, numpy and torch scalars Python's.

    Raises:
        TypeError: `value` holds something that is not data, such as a tensor of many elements or a model.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if attrs.has(type(value)) and type(value) in _KINDS.values():
        return value
    if isinstance(value, Mapping):
        return MappingProxyType({plain(key): plain(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    if isinstance(value, PurePath):
        return str(value)
    if getattr(value, "ndim", None) == 0:
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} is not plain data")


def _data() -> Any:
    return attrs.field(factory=dict, converter=plain)


def in_order(value: Any) -> Any:
    """Plain data whose mappings are sorted by name, all the way down.

    What a strategy is told must not depend on whether the run was resumed, the order of figures included: it may break
    a tie by it.
    """
    value = plain(value)
    if isinstance(value, Mapping):
        names = sorted(value) if all(isinstance(key, str) for key in value) else list(value)
        return MappingProxyType({name: in_order(value[name]) for name in names})
    return tuple(map(in_order, value)) if isinstance(value, tuple) else value


def _figures() -> Any:
    return attrs.field(factory=dict, converter=in_order)


@attrs.frozen
class Use:
    """A part asked for by name, with its options: `Use("one-cycle", {"pct_start": 0.3})`.

    Args:
        name: As the registry knows it.
        options: By option name; the part's defaults hold for the others.
    """

    name: str
    options: Mapping[str, Any] = _data()


def use(name: str, **options: Any) -> Use:
    """Ask for a part by name: `Phase(..., schedule=use("one-cycle", pct_start=0.3))`."""
    return Use(name, options)


def _as_use(value: str | Use | None) -> Use | None:
    return Use(value) if isinstance(value, str) else value


def _names(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


def _numbers(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(values)


def _as_selectors(value: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


@attrs.frozen
class Phase:
    """Train what a selector names.

    Args:
        name: Unique within the run; `Blend` and the report refer to it. `"start"` is taken.
        train: What trains: `"head"`, `"all"`, `"norms"`, `"biases"`, a layer group, a slice of groups such as
            `"groups[-2:]"`, a module's path, a glob over parameter names, or `"re:..."`. Several are joined in order;
            one with `!` in front takes away. All else is frozen.
        epochs: Passes over the training split; give this or `steps`.
        steps: Optimizer steps, where an epoch is too coarse.
        lr: Peak learning rate, of the group nearest to the answer where `layer_decay` is given.
        lr_scales: Factors on `lr` by selector, at least 0; a later one beats an earlier one.
        layer_decay: Factor on `lr` from each layer group to the one below it, in (0, 1].
        schedule: The course of the rate over this phase; None leaves it to the run.
        optimizer: None goes on with the run's; another name starts a new one.
        weight_decay: Of matrices; biases and norms are never decayed. None is the optimizer's default.
        patience: Epochs without gain after which the phase stops; None never stops early.
        monitor: The validation figure of early stopping and best weights, or None for the targets' own.
        monitor_mode: `"max"` or `"min"`, where tuneforge does not know whether more of `monitor` is better.
        min_gain: What counts as a gain of `monitor`, absolute.
        restore_best: End on the weights of the best epoch rather than the last.
        norms: `"still"`: a norm with a frozen parameter keeps its statistics; `"moving"`: frozen norms go on
            adapting their statistics to the data.
        class_weights: Factors on the loss by class name, `"balanced"`, or None.
        sampling: How often each class is drawn, by name, `"balanced"`, or None for as it comes.
    """

    name: str
    train: tuple[str, ...] = attrs.field(default=("all",), converter=_as_selectors, kw_only=True)
    epochs: int | None = attrs.field(default=None, kw_only=True)
    steps: int | None = attrs.field(default=None, kw_only=True)
    lr: float = attrs.field(default=1e-3, kw_only=True)
    lr_scales: Mapping[str, float] = attrs.field(factory=dict, converter=plain, kw_only=True)
    layer_decay: float = attrs.field(default=1.0, kw_only=True)
    schedule: Use | None = attrs.field(default=None, converter=_as_use, kw_only=True)
    optimizer: Use | None = attrs.field(default=None, converter=_as_use, kw_only=True)
    weight_decay: float | None = attrs.field(default=None, kw_only=True)
    patience: int | None = attrs.field(default=None, kw_only=True)
    monitor: str | None = attrs.field(default=None, kw_only=True)
    monitor_mode: str | None = attrs.field(default=None, kw_only=True)
    min_gain: float = attrs.field(default=0.0, kw_only=True)
    restore_best: bool = attrs.field(default=False, kw_only=True)
    norms: str = attrs.field(default="still", kw_only=True)
    class_weights: Mapping[str, float] | str | None = attrs.field(default=None, converter=plain, kw_only=True)
    sampling: Mapping[str, float] | str | None = attrs.field(default=None, converter=plain, kw_only=True)

    def __attrs_post_init__(self) -> None:
        _require(self, (self.epochs is None) != (self.steps is None), "give epochs or steps, one of the two")
        for name in ("epochs", "steps", "patience"):
            _require_number(self, name, whole=True, low=1)
        _require_number(self, "lr", low=0.0)
        _require(self, self.lr > 0, "lr must be greater than 0")
        _require_number(self, "layer_decay", low=0.0, high=1.0)
        _require(self, self.layer_decay > 0, "layer_decay must be greater than 0")
        _require_number(self, "weight_decay", low=0.0)
        _require_number(self, "min_gain", low=0.0)
        for name in ("lr_scales", "class_weights", "sampling"):
            _require_factors(self, name)
        _require(
            self, isinstance(self.restore_best, bool), f"restore_best must be True or False, not {self.restore_best!r}"
        )
        _require(self, self.norms in ("still", "moving"), f"norms must be 'still' or 'moving', not {self.norms!r}")
        _require_direction(self)


@attrs.frozen
class Fit:
    """Solve the head on frozen features, to convergence, and load it (a linear probe).

    Args:
        name: Unique within the run.
        l2: Strength of the ridge on the head's weights, relative to the mean loss.
    """

    name: str
    l2: float = attrs.field(default=1e-3, kw_only=True)

    def __attrs_post_init__(self) -> None:
        _require_number(self, "l2", low=0.0)
        _require(self, self.l2 > 0, "l2 must be greater than 0")


@attrs.frozen
class Probe:
    """Measure and train nothing: the run's state is bit-equal before and after.

    Args:
        name: Unique within the run.
        measure: `"gradients"`: the ratio of gradient norm to weight norm; `"features"`: how far each group's output
            on validation lies from that on training; `"rates"`: the loss after one step at each of a range of rates.
        train: For gradients and rates, what would train.
        batches: Training batches to look at.
        by: For gradients, one figure a layer `"group"` or one a `"tensor"`.
    """

    name: str
    measure: str = attrs.field(default="gradients", kw_only=True)
    train: tuple[str, ...] = attrs.field(default=("all",), converter=_as_selectors, kw_only=True)
    batches: int = attrs.field(default=5, kw_only=True)
    by: str = attrs.field(default="group", kw_only=True)

    def __attrs_post_init__(self) -> None:
        known = ("gradients", "features", "rates")
        _require(self, self.measure in known, f"measure must be one of {', '.join(known)}, not {self.measure!r}")
        _require(self, self.batches >= 1, f"batches must be at least 1, not {self.batches}")
        _require(self, self.by in ("group", "tensor"), f"by must be 'group' or 'tensor', not {self.by!r}")


@attrs.frozen
class Blend:
    """Interpolate between named snapshots of the weights and keep the best on validation (WiSE-FT, soups).

    With one snapshot this goes back to it.

    Args:
        name: Unique within the run.
        snapshots: `"start"`, or the name of an earlier step: its weights at its end.
        weights: With two snapshots, candidate weights of the last one; of any other number the mean is taken.
        monitor: The validation figure that picks, or None for the targets' own.
        monitor_mode: `"max"` or `"min"`, where tuneforge does not know whether more of `monitor` is better.
    """

    name: str
    snapshots: tuple[str, ...] = attrs.field(converter=_names, kw_only=True)
    weights: tuple[float, ...] = attrs.field(
        default=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), converter=_numbers, kw_only=True
    )
    monitor: str | None = attrs.field(default=None, kw_only=True)
    monitor_mode: str | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        _require_direction(self)
        _require(self, len(self.snapshots) >= 1, "name at least one snapshot")
        _require(self, bool(self.weights), "give at least one weight")
        _require(self, all(0 <= weight <= 1 for weight in self.weights), "weights must lie from 0 to 1")


Step = Phase | Fit | Probe | Blend
Steps = Generator[Step, Any, None]
"""The type of a strategy that is a generator: it yields steps, and each `yield` returns the step's answer."""


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
        views: Fixed augmented views that each training sample was seen in, where features were kept; else 0.
    """

    step: str
    reason: str = ""
    epochs: int = 0
    steps: int = 0
    best_epoch: int = 0
    train: Mapping[str, Any] = _figures()
    val: Mapping[str, Any] = _figures()
    history: tuple[Mapping[str, Any], ...] = attrs.field(default=(), converter=in_order)
    trained: int = 0
    frozen: int = 0
    unmoved: tuple[str, ...] = attrs.field(default=(), converter=_names)
    chosen: Mapping[str, Any] = _figures()
    views: int = 0


@attrs.frozen
class Readings:
    """The answer to a `Probe`.

    Args:
        step: The probe's name.
        values: By layer group or tensor name; for rates, by the rate.
    """

    step: str
    values: Mapping[Any, float] = _data()


Answer = Report | Readings


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
    budget: Mapping[str, float] = _data()

    @property
    def backbone(self) -> tuple[GroupInfo, ...]:
        """All groups but the head, from the input up."""
        return self.groups[:-1]

    @property
    def head(self) -> GroupInfo:
        """The group nearest to the answer."""
        return self.groups[-1]

    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training split."""
        return -(-self.num_train // self.batch_size)


_KINDS = {cls.__name__: cls for cls in (Use, Phase, Fit, Probe, Blend, Report, Readings, GroupInfo, Brief)}


def to_json(value: Any) -> str:
    """One line of JSON from which `from_json` restores an equal value; equal values give equal text."""
    return json.dumps(_encode(plain(value)), sort_keys=True, allow_nan=False)


def from_json(text: str) -> Any:
    """The value that `to_json` wrote.

    Raises:
        UsageError: The text is not such a value.
    """
    try:
        return _decode(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("not a step or an answer", where=text[:80], why=str(error)) from error


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if type(value) in _KINDS.values():
        fields = {field.name: _encode(getattr(value, field.name)) for field in attrs.fields(type(value))}
        if isinstance(value, Phase):  # a later factor beats an earlier one, so their order counts
            fields["lr_scales"] = _encode_mapping(value.lr_scales, keeps_order=True)
        if isinstance(value, Readings):  # that of the layers: rates made of them must be the same in a replay
            fields["values"] = _encode_mapping(value.values, keeps_order=True)
        return {"$kind": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return _encode_mapping(value, keeps_order=False)
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _encode_mapping(value: Mapping[Any, Any], *, keeps_order: bool) -> dict[str, Any]:
    """A JSON object, whose keys will be sorted; or a list of pairs where keys are no plain text, or order counts."""
    plain_keys = all(isinstance(key, str) and not key.startswith("$") for key in value)
    if plain_keys and not (keeps_order and list(value) != sorted(value)):
        return {key: _encode(item) for key, item in value.items()}
    return {"$map": [[_encode(key), _encode(item)] for key, item in value.items()]}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$map" in value:
        return MappingProxyType({_decode(key): _decode(item) for key, item in value["$map"]})
    if "$kind" in value:
        fields = {key: _decode(item) for key, item in value.items() if key != "$kind"}
        return _KINDS[value["$kind"]](**fields)
    return MappingProxyType({key: _decode(item) for key, item in value.items()})


def _require_number(step: Any, name: str, *, low: float, high: float = math.inf, whole: bool = False) -> None:
    value = getattr(step, name)
    if value is None:
        return
    kind = int if whole else (int, float)
    holds = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    span = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    _require(step, holds, f"{name} must be {'a whole number' if whole else 'a number'} of {span}, not {value!r}")


def _require_factors(step: Any, name: str) -> None:
    factors = getattr(step, name)
    if not isinstance(factors, Mapping) or not factors:
        return
    known = [value for value in factors.values() if isinstance(value, (int, float))]
    holds = len(known) == len(factors) and all(math.isfinite(value) and value >= 0 for value in known)
    _require(step, holds, f"{name} must be numbers of at least 0, not {dict(factors)}")


def _require_direction(step: Any) -> None:
    mode = step.monitor_mode
    _require(step, mode in (None, "max", "min"), f"monitor_mode must be 'max' or 'min', not {mode!r}")


def _require(step: Any, holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(f"{type(step).__name__} '{step.name}': {message}", where="a step of the strategy")
