"""Optimizers by name: SGD, AdamW, and whatever else torch has.

Each has `weight_decay`, its default for matrices, and `make(groups, fused=...)`. torch is imported when an optimizer
is made or checked, not when this file is, so that help costs no torch.
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
    "LBFGS": "it evaluates the loss several times a step (a closure), and a step here has one gradient",
    "SparseAdam": "it takes sparse gradients only, and most layers give dense ones",
}
_RESERVED_ARGUMENTS = {
    "params": "the phase says what trains",
    "lr": "the phase says the rate",
    "weight_decay": "it is an option of its own",
    "fused": "the engine asks for it",
    "foreach": "torch chooses it",
}


@component(api=1)
class SGD:
    """Stochastic gradient descent with momentum: torch.optim.SGD."""

    momentum: float = option(default=0.9, help="Share of the last step that goes on.", check=FRACTION_OR_ZERO)
    nesterov: bool = option(default=False, help="Look ahead along the momentum (Nesterov).")
    weight_decay: float = option(default=0.0, help="Decay of matrices, added to their gradient.", check=ge(0))

    def __attrs_post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise OptionError("nesterov needs a momentum", where="sgd", fix="give momentum, or leave nesterov off")

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """The optimizer over `groups`.

        Args:
            groups: torch's parameter groups: `params`, `lr`, and `weight_decay` where it is not the default.
            fused: Ask for the kernel that updates a whole group at once, where torch has one for these tensors.
        """
        import torch

        arguments = {"momentum": self.momentum, "nesterov": self.nesterov, "weight_decay": self.weight_decay}
        # The fused kernel cannot mix tensors with and without a momentum in one group, as a thawed layer makes them.
        return _build_optimizer(torch.optim.SGD, groups, arguments, fused=fused and not self.momentum)


@component(api=1)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101): torch.optim.AdamW."""

    beta1: float = option(default=0.9, help="Memory of the mean gradient.", check=FRACTION_OR_ZERO)
    beta2: float = option(default=0.999, help="Memory of the mean squared gradient.", check=FRACTION_OR_ZERO)
    eps: float = option(default=1e-8, help="Added to the root of the mean squared gradient.", check=gt(0))
    weight_decay: float = option(default=0.01, help="Decay of matrices, times the rate.", check=ge(0))

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """The optimizer over `groups`; arguments as of `SGD.make`."""
        import torch

        arguments = {"betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}
        return _build_optimizer(torch.optim.AdamW, groups, arguments, fused=fused)


@component(api=1)
class TorchOptimizer:
    """Any optimizer of torch.optim by its name, such as RMSprop or NAdam."""

    kind: str = option(help="Name in torch.optim, in any case.")
    arguments: dict[str, float] = option(
        default={}, help="Its arguments that are single numbers; 1 and 0 for on and off."
    )
    weight_decay: float = option(default=0.0, help="Decay of matrices, the optimizer's own way.", check=ge(0))

    def __attrs_post_init__(self) -> None:
        self._convert_arguments(_find_optimizer_class(self.kind))

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        """The optimizer over `groups`; arguments as of `SGD.make`.

        Raises:
            OptionError: It cannot train these tensors, or decay is asked of one that has none.
        """
        kind = _find_optimizer_class(self.kind)
        if "weight_decay" not in _get_parameters(kind) and any(group.get("weight_decay", 0) > 0 for group in groups):
            raise _no_weight_decay_error(kind)
        try:
            return _build_optimizer(kind, groups, self._convert_arguments(kind), fused=fused)
        except (ValueError, TypeError) as error:
            raise OptionError(f"{kind.__name__} cannot be made", where="--optimizer torch", why=str(error)) from error

    def _convert_arguments(self, kind: type[torch.optim.Optimizer]) -> dict[str, Any]:
        """The keyword arguments as `kind` takes them.

        Raises:
            UnknownNameError: It has no such argument.
            OptionError: The argument is not a single number, or not the optimizer's to decide.
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
    """An optimizer, fused where asked for and possible, over copies of the groups: torch writes into them."""
    if fused and "fused" in inspect.signature(kind).parameters and _supports_fused(groups):
        try:
            return kind([dict(group) for group in groups], **arguments, fused=True)
        except RuntimeError:
            pass  # this class has kernels, but none for this device (Adagrad on CUDA), and says so in this way
    return kind([dict(group) for group in groups], **arguments)


def _supports_fused(groups: list[dict[str, Any]]) -> bool:
    """True where torch can have fused kernels for all tensors; SGD and Adam would complain at the first step only."""
    tensors = [tensor for group in groups for tensor in group["params"]]
    return all(tensor.is_floating_point() and tensor.device.type in _FUSED_DEVICES for tensor in tensors)


def _find_optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of torch.optim of that name.

    Raises:
        UnknownNameError: There is none; the message offers the nearest.
        OptionError: It cannot serve here.
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
    """A number as the argument's own kind; the default tells which that is."""
    where = f"--optimizer.arguments {name}"
    if name in _RESERVED_ARGUMENTS:
        raise OptionError(f"'{name}' is not among the arguments", where=where, why=_RESERVED_ARGUMENTS[name])
    if name not in known:
        raise UnknownNameError(f"{kind.__name__} has no argument '{name}'", where=where, fix=suggest_name(name, known))
    default = known[name].default
    if not isinstance(default, (bool, int, float)):
        raise OptionError(
            f"'{name}' of {kind.__name__} is not a single number",
            where=where,
            why=f"its default is {default}",
            fix="leave it at its default, or write a component that sets it",
        )
    return bool(value) if isinstance(default, bool) else value


def _no_weight_decay_error(kind: type[torch.optim.Optimizer]) -> OptionError:
    return OptionError(
        f"{kind.__name__} has no weight decay",
        where="--optimizer.weight-decay",
        why="torch would pass over it in silence",
        fix="set weight decay to 0, or choose another optimizer",
    )
