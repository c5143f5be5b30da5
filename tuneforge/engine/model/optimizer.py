"""The optimizer of a run: parameter groups are rebuilt for each phase, and state is kept by parameter name."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.model.freezing import select
from tuneforge.engine.model.fsdp import make_optimizer
from tuneforge.engine.model.model import NORMS, Model
from tuneforge.errors import SelectorError
from tuneforge.plugin.steps import Phase

PEAK_LR = "peak_lr"
_GROUP_KEYS = ("params", "lr", PEAK_LR, "weight_decay")
"""What the engine sets in a parameter group; the rest belongs to the optimizer."""


@attrs.define(eq=False)
class Optimization:
    """The optimizer over the phases of a run.

    The optimizer state of a parameter lives as long as the parameter trains in every phase; freezing it drops the
    state. A phase with another optimizer, or with other options of it, starts without state. What an optimizer keeps in
    its parameter groups and attributes, such as a count of steps, lives and is saved with the state.

    Args:
        component: The component that creates the optimizer.
        optimizer: The torch optimizer; None before the first phase.
        training: True while an optimizer with modes (`train` and `eval`, as schedule-free ones have) is to train.
        pending_state: What `state` returned when a checkpoint was saved, loaded at the next `set_param_groups`.
    """

    component: Any = None
    optimizer: torch.optim.Optimizer | None = None
    training: bool = False
    pending_state: dict[str, Any] = attrs.field(factory=dict)
    _initial_attributes: dict[str, Any] = attrs.field(factory=dict)

    def set_param_groups(self, model: Model, phase: Phase, trainable: list[str], component: Any, *, same: bool) -> None:
        """Partition the trained parameters into groups, and drop the state of those that no longer train.

        Args:
            model: The model, after `freeze`.
            phase: Gives learning rates and weight decay.
            trainable: Names of the parameters that train.
            component: The optimizer component to use.
            same: True if the phase before used an equal component; the state of its parameters is then kept.
        """
        state = (self.pending_state if self.optimizer is None else self._live_state(model)) if same else {}
        groups = parameter_groups(model, phase, trainable, weight_decay=component.weight_decay)
        groups = _split_by_group_state(groups, self._group_states(model, state))
        if self.optimizer is None or not same:
            self._make(component, groups)
            if state:
                self.set_training(state["training"])  # without state this sets the mode and changes no weight
                self.load_state(model, state)
        else:
            kept = {id(parameter) for group in groups for parameter in group["params"]}
            keys = [each for each in self.optimizer.state if isinstance(each, Tensor) and id(each) not in kept]
            for key in keys:
                del self.optimizer.state[key]
            self.optimizer.param_groups.clear()
            for group in groups:
                self.optimizer.add_param_group(group)
            self._load_group_states(self._group_states(model, state))
        self.pending_state = {}

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self._require_optimizer().param_groups:
            group["lr"] = group[PEAK_LR] * factor

    def set_training(self, training: bool) -> None:
        """Switch an optimizer with modes: in eval mode its parameters are those to evaluate and to save."""
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if training is not self.training and callable(switch):
            switch()
        self.training = training

    def step(self) -> None:
        """Apply the gradients and drop them."""
        optimizer = self._require_optimizer()
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def reset_state(self) -> None:
        """Start the optimizer anew, because weights were replaced."""
        self.pending_state = {}
        if self.optimizer is not None:
            own = [{key: group[key] for key in _GROUP_KEYS if key in group} for group in self.optimizer.param_groups]
            self._make(self.component, own)

    def state(self, model: Model) -> dict[str, Any]:
        """Return the optimizer's state as plain data and tensors; assign it to `pending_state` to resume.

        Returns:
            `parameters`: the state of each parameter by name, and that of its group; `shared`: state under other keys;
            `attributes`: plain attributes that have changed; `training`: the mode. Empty before the first phase.
        """
        return self.pending_state if self.optimizer is None else self._live_state(model)

    def _live_state(self, model: Model) -> dict[str, Any]:
        optimizer = self._require_optimizer()
        groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        return {
            "parameters": {
                name: {
                    "state": dict(optimizer.state.get(parameter, {})),
                    "group": _group_state(groups.get(id(parameter), {}), optimizer.defaults),
                }
                for name, parameter in model.parameters().items()
                if parameter in optimizer.state or id(parameter) in groups
            },
            "shared": {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)},
            "attributes": {
                name: value
                for name, value in _plain_attributes(optimizer).items()
                if name not in self._initial_attributes or not _equal(value, self._initial_attributes[name])
            },
            "training": self.training,
        }

    def load_state(self, model: Model, state: Mapping[str, Any]) -> None:
        """Replace the optimizer's state by what `state` returned, for the parameters that train now."""
        optimizer = self._require_optimizer()
        optimizer.state.clear()
        trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for name, parameter in model.parameters().items():
            saved = state.get("parameters", {}).get(name, {}).get("state", {}) if id(parameter) in trained else {}
            for key, value in saved.items():
                optimizer.state[parameter][key] = _match_layout(parameter, _clone(value))
        for key, value in state.get("shared", {}).items():
            optimizer.state[key] = value
        for key, value in (self._initial_attributes | state.get("attributes", {})).items():
            setattr(optimizer, key, _clone(value))
        self._load_group_states(self._group_states(model, state))

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups with their present learning rates."""
        return self._require_optimizer().param_groups

    def lrs(self) -> list[float]:
        """Return the present learning rates of the groups, highest first."""
        return sorted({group["lr"] for group in self._require_optimizer().param_groups}, reverse=True)

    def _make(self, component: Any, groups: list[dict[str, Any]]) -> None:
        self.component, self.optimizer = component, make_optimizer(component, groups)
        self.training = False
        self._initial_attributes = {name: _clone(each) for name, each in _plain_attributes(self.optimizer).items()}

    def _group_states(self, model: Model, state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Return the state of the group of each parameter, by the parameter's id."""
        named = model.parameters()
        return {id(named[name]): each["group"] for name, each in state.get("parameters", {}).items()}

    def _load_group_states(self, states: Mapping[int, dict[str, Any]]) -> None:
        optimizer = self._require_optimizer()
        for group in optimizer.param_groups:
            saved = states.get(id(group["params"][0]), {})
            for key in [key for key in group if key not in _GROUP_KEYS and key not in saved]:
                if key in optimizer.defaults:
                    group[key] = optimizer.defaults[key]
                else:
                    del group[key]
            group.update({key: _clone(value) for key, value in saved.items()})

    def _require_optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None, "set_param_groups() comes before a step"
        return self.optimizer


def _group_state(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer has changed in a parameter group, such as a count of its steps."""
    return {
        key: value
        for key, value in group.items()
        if key not in _GROUP_KEYS and (key not in defaults or not _equal(value, defaults[key]))
    }


def _split_by_group_state(groups: list[dict[str, Any]], states: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Split the groups so that all parameters of a group continue from the same group state."""
    parts: list[dict[str, Any]] = []
    for group in groups:
        members: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            state = states.get(id(parameter), {})
            key = repr({name: id(each) if isinstance(each, Tensor) else each for name, each in state.items()})
            members.setdefault(key, []).append(parameter)
        parts += [{**group, "params": parameters} for parameters in members.values()]
    return parts


def _plain_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the attributes that are numbers, text or tensors, or lists of numbers and text."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, (Tensor, bool, int, float, str, type(None)))
        or (isinstance(value, list) and all(isinstance(each, (bool, int, float, str)) for each in value))
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _match_layout(parameter: nn.Parameter, value: Any) -> Any:
    """Return a state tensor in the memory layout of its parameter, which fused kernels rely on."""
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value


def parameter_groups(model: Model, phase: Phase, trainable: list[str], *, weight_decay: float) -> list[dict[str, Any]]:
    """Partition the trained parameters by learning rate and weight decay, in as few groups as that allows.

    Args:
        model: Whose parameters.
        phase: Gives the peak learning rate, its decay by layer group and its factors by selector.
        trainable: Names of the parameters that train.
        weight_decay: The optimizer's default; `phase.weight_decay` overrides it.

    Returns:
        Groups of equal learning rate and equal weight decay; norms and biases are not decayed. A model with complex
        parameters is not trained by fused kernels, which take none.

    Raises:
        SelectorError: A selector of `phase.lr_scales` matches no parameter that trains.
    """
    decay = weight_decay if phase.weight_decay is None else phase.weight_decay
    scales = _lr_scales(model, phase, trainable)
    undecayed = no_weight_decay(model.module)
    named = model.parameters()
    partition: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name in trainable:
        lr = phase.lr * phase.layer_decay ** model.depth_of(name) * scales.get(name, 1.0)
        partition.setdefault((lr, 0.0 if name in undecayed else decay), []).append(named[name])
    # Decided for the whole model, because a later phase adds parameters to the optimizer of an earlier one.
    kernels = {"fused": False} if any(each.is_complex() for each in named.values()) else {}
    return [
        {"params": parameters, "lr": lr, PEAK_LR: lr, "weight_decay": group_decay, **kernels}
        for (lr, group_decay), parameters in partition.items()
    ]


def _lr_scales(model: Model, phase: Phase, trained: list[str]) -> dict[str, float]:
    scales: dict[str, float] = {}
    for selector, scale in phase.lr_scales.items():
        names = [name for name in select(model, [selector]) if name in set(trained)]
        if not names:
            raise SelectorError(
                f"lr_scales names '{selector}', which matches no parameter that trains",
                where=f"phase '{phase.name}'",
                why=f"the phase trains {' and '.join(phase.train)}",
                fix="remove it, or train what it matches",
            )
        scales |= dict.fromkeys(names, scale)
    return scales


def no_weight_decay(module: nn.Module) -> set[str]:
    """Return the names of the parameters without weight decay: those of norms, biases, and all of at most one axis."""
    norms = [path for path, child in module.named_modules() if isinstance(child, NORMS)]
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim <= 1 or name.endswith("bias") or name.rpartition(".")[0] in norms
    }
