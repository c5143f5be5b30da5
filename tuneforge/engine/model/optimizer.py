"""The optimizer of a run: parameter groups are rebuilt for each phase, and state is kept by parameter name."""

from __future__ import annotations

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


@attrs.define(eq=False)
class Optimization:
    """The optimizer over the phases of a run.

    The optimizer state of a parameter lives as long as the parameter trains in every phase; freezing it drops the
    state. A phase with another optimizer, or with other options of it, starts without state.

    Args:
        component: The component that creates the optimizer.
        optimizer: The torch optimizer; None before the first phase.
        pending_state: State of a checkpoint by parameter name, loaded at the next `set_param_groups`.
    """

    component: Any = None
    optimizer: torch.optim.Optimizer | None = None
    pending_state: dict[str, dict[str, Any]] = attrs.field(factory=dict)

    def set_param_groups(self, model: Model, phase: Phase, trainable: list[str], component: Any, *, same: bool) -> None:
        """Partition the trained parameters into groups, and drop the state of those that no longer train.

        Args:
            model: The model, after `freeze`.
            phase: Gives learning rates and weight decay.
            trainable: Names of the parameters that train.
            component: The optimizer component to use.
            same: True if the phase before used an equal component; the state of its parameters is then kept.
        """
        groups = parameter_groups(model, phase, trainable, weight_decay=component.weight_decay)
        if self.optimizer is None or not same:
            self.component, self.optimizer = component, make_optimizer(component, groups)
        else:
            kept = {id(parameter) for group in groups for parameter in group["params"]}
            for parameter in [each for each in self.optimizer.state if id(each) not in kept]:
                del self.optimizer.state[parameter]
            self.optimizer.param_groups.clear()
            for group in groups:
                self.optimizer.add_param_group(group)
        if same:
            named = model.parameters()
            for name in (name for name in trainable if name in self.pending_state):
                self.optimizer.state[named[name]] = {
                    key: _match_layout(named[name], value) for key, value in self.pending_state[name].items()
                }
        self.pending_state = {}

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to `factor` times its peak."""
        for group in self._require_optimizer().param_groups:
            group["lr"] = group[PEAK_LR] * factor

    def step(self) -> None:
        """Apply the gradients and drop them."""
        optimizer = self._require_optimizer()
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def reset_state(self) -> None:
        """Drop the state of every parameter, because weights were replaced."""
        self.pending_state = {}
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def state(self, model: Model) -> dict[str, dict[str, Any]]:
        """Return the optimizer's state by parameter name; assign it to `pending_state` to resume."""
        if self.optimizer is None:
            return self.pending_state
        return {
            name: dict(self.optimizer.state[parameter])
            for name, parameter in model.parameters().items()
            if parameter in self.optimizer.state
        }

    def load_state(self, model: Model, state: dict[str, dict[str, Any]]) -> None:
        """Replace the optimizer's state by what `state` returned, for the parameters that train now."""
        optimizer = self._require_optimizer()
        optimizer.state.clear()
        for name, parameter in model.parameters().items():
            for key, value in state.get(name, {}).items():
                kept = value.clone() if isinstance(value, Tensor) else value
                optimizer.state[parameter][key] = _match_layout(parameter, kept)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups with their present learning rates."""
        return self._require_optimizer().param_groups

    def lrs(self) -> list[float]:
        """Return the present learning rates of the groups, highest first."""
        return sorted({group["lr"] for group in self._require_optimizer().param_groups}, reverse=True)

    def _require_optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None, "set_param_groups() comes before a step"
        return self.optimizer


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
        Groups of equal learning rate and equal weight decay; norms and biases are not decayed.

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
    return [
        {"params": parameters, "lr": lr, PEAK_LR: lr, "weight_decay": group_decay}
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
