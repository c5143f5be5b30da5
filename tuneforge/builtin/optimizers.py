"""Optimizers: SGD, AdamW, and any other class of torch.optim by name.

Each has `weight_decay`, the default for weight matrices, and `make(groups, fused=...)`. torch is imported only when an
optimizer is created or checked, so that `--help` needs no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tuneforge import OptionError, UnknownNameError, component, ge, gt, option
from tuneforge.builtin.checks import FRACTION_OR_ZERO
from tuneforge.errors import suggest_name

if TYPE_CHECKING:
    import torch

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
_UNSUPPORTED_OPTIMIZERS = {
    "LBFGS": "it evaluates the loss several times per step (a closure), and a step here has one gradient",
    "SparseAdam": "it takes sparse gradients only, and most layers have dense ones",
}
_RESERVED_ARGUMENTS = {
    "params": "the phase selects the parameters",
    "lr": "the phase sets the learning rate",
    "weight_decay": "it is a separate option",
    "fused": "the engine sets it",
    "foreach": "torch chooses it",
}


@component(api=1)
class SGD:
    """Stochastic gradient descent with momentum: torch.optim.SGD."""

    momentum: float = option(default=0.9, help="Momentum factor.", check=FRACTION_OR_ZERO)
    nesterov: bool = option(default=False, help="Use Nesterov momentum.")
    weight_decay: float = option(default=0.0, help="Weight decay of weight matrices (L2 penalty).", check=ge(0))

    def __attrs_post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise OptionError("nesterov needs a momentum", where="sgd", fix="give momentum, or leave nesterov off")

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """Return the optimizer of `groups`.

        Args:
            groups: torch's parameter groups: `params`, `lr`, and `weight_decay` where it is not the default.
            fused: Use the fused kernel where torch has one for these tensors.
        """
        import torch

        arguments = {"momentum": self.momentum, "nesterov": self.nesterov, "weight_decay": self.weight_decay}
        # A group with a newly unfrozen layer mixes tensors with and without a momentum, which the fused kernel cannot.
        return _build_optimizer(torch.optim.SGD, groups, arguments, fused=fused and not self.momentum)


@component(api=1)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101): torch.optim.AdamW."""

    beta1: float = option(default=0.9, help="Decay of the mean gradient.", check=FRACTION_OR_ZERO)
    beta2: float = option(default=0.999, help="Decay of the mean squared gradient.", check=FRACTION_OR_ZERO)
    eps: float = option(default=1e-8, help="Term added to the denominator.", check=gt(0))
    weight_decay: float = option(default=0.01, help="Decoupled weight decay of weight matrices.", check=ge(0))

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """Return the optimizer of `groups`; arguments as in `SGD.make`."""
        import torch

        arguments = {"betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}
        return _build_optimizer(torch.optim.AdamW, groups, arguments, fused=fused)


@component(api=1)
class TorchOptimizer:
    """Any optimizer of torch.optim by name, such as RMSprop or NAdam."""

    kind: str = option(help="Name in torch.optim, case-insensitive.")
    arguments: dict[str, float] = option(default={}, help="Its numeric arguments; 1 and 0 for true and false.")
    weight_decay: float = option(default=0.0, help="Weight decay of weight matrices.", check=ge(0))

    def __attrs_post_init__(self) -> None:
        self._convert_arguments(_find_optimizer_class(self.kind))

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """Return the optimizer of `groups`; arguments as in `SGD.make`.

        Raises:
            OptionError: It cannot train these tensors, or has no weight decay.
        """
        kind = _find_optimizer_class(self.kind)
        if "weight_decay" not in _get_parameters(kind) and any(group.get("weight_decay", 0) > 0 for group in groups):
            raise _no_weight_decay_error(kind)
        try:
            return _build_optimizer(kind, groups, self._convert_arguments(kind), fused=fused)
        except (ValueError, TypeError) as error:
            raise OptionError(f"cannot create {kind.__name__}", where="--optimizer torch", why=str(error)) from error

    def _convert_arguments(self, kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
        """Return the keyword arguments with the types of their defaults.

        Raises:
            UnknownNameError: It has no such argument.
            OptionError: The argument is not a number, or is set elsewhere.
        """
        known = {name: each for name, each in _get_parameters(kind).items() if name not in _RESERVED_ARGUMENTS}
        given = {name: _convert_argument(kind, name, value, known) for name, value in self.arguments.items()}
        if "weight_decay" in _get_parameters(kind):
            return {**given, "weight_decay": self.weight_decay}
        if self.weight_decay > 0:
            raise _no_weight_decay_error(kind)
        return given


def _build_optimizer(
    kind: Callable[..., torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    arguments: Mapping[str, Any],
    *,
    fused: bool,
) -> torch.optim.Optimizer:
    """Return an optimizer over copies of the groups, which torch modifies; fused if requested and possible."""
    if fused and "fused" in inspect.signature(kind).parameters and _supports_fused(groups):
        try:
            return kind([dict(group) for group in groups], **arguments, fused=True)
        except RuntimeError:
            pass  # the class has a fused kernel, but not for this device (Adagrad on CUDA)
    return kind([dict(group) for group in groups], **arguments)


def _supports_fused(groups: list[dict[str, Any]]) -> bool:
    """Return True if fused kernels support all tensors; SGD and Adam would raise only at the first step."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    return all(tensor.is_floating_point() and tensor.device.type in _FUSED_DEVICES for tensor in tensors)


def _find_optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of torch.optim with that name, ignoring case.

    Raises:
        UnknownNameError: There is none.
        OptionError: It is not supported.
    """
    import torch

    classes = [each for each in vars(torch.optim).values() if inspect.isclass(each)]
    found = {
        each.__name__.lower(): each
        for each in classes
        if issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
    }
    if name.lower() not in found:
        fix = suggest_name(name, (each.__name__ for each in found.values()))
        raise UnknownNameError(f"torch.optim has no optimizer '{name}'", where="--optimizer.kind", fix=fix)
    kind = found[name.lower()]
    if kind.__name__ in _UNSUPPORTED_OPTIMIZERS:
        raise OptionError(
            f"{kind.__name__} cannot train here",
            where="--optimizer.kind",
            why=_UNSUPPORTED_OPTIMIZERS[kind.__name__],
            fix="use --optimizer adamw or sgd",
        )
    return kind


def _get_parameters(kind: type[torch.optim.Optimizer]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def _convert_argument(
    kind: type[torch.optim.Optimizer], name: str, value: float, known: Mapping[str, inspect.Parameter]
) -> float | bool:
    """Return a number with the type of the argument's default."""
    where = f"--optimizer.arguments {name}"
    if name in _RESERVED_ARGUMENTS:
        raise OptionError(f"'{name}' is not among the arguments", where=where, why=_RESERVED_ARGUMENTS[name])
    if name not in known:
        raise UnknownNameError(f"{kind.__name__} has no argument '{name}'", where=where, fix=suggest_name(name, known))
    default = known[name].default
    if not isinstance(default, (bool, int, float)):
        raise OptionError(
            f"'{name}' of {kind.__name__} is not a number",
            where=where,
            why=f"its default is {default}",
            fix="leave it at its default, or write a component that sets it",
        )
    return bool(value) if isinstance(default, bool) else value


def _no_weight_decay_error(kind: type[torch.optim.Optimizer]) -> OptionError:
    return OptionError(
        f"{kind.__name__} has no weight decay",
        where="--optimizer.weight-decay",
        why="torch would ignore it silently",
        fix="set weight decay to 0, or choose another optimizer",
    )
