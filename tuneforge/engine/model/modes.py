"""Training mode and eval mode of modules."""

from __future__ import annotations

import attrs
from torch import nn

Modes = list[tuple[nn.Module, bool]]
"""Each module with True for training mode, a parent before its children."""


def get_modes(module: nn.Module) -> Modes:
    """Return the present mode of a module and of all modules in it."""
    return [(child, child.training) for child in module.modules()]


def set_modes(modes: Modes) -> None:
    """Put each module into its mode; a module that is already in it costs one comparison.

    A module that overrides `train` (to merge weights for evaluation, for example) is switched by calling it. Its
    children come later in the list, so a `train` that switches them too does no harm.
    """
    for module, training in modes:
        if module.training is not training:
            if type(module).train is nn.Module.train:
                module.training = training
            else:
                module.train(training)


@attrs.frozen(eq=False)
class ModuleFlags:
    """The mode of each module and `requires_grad` of each parameter, as they were before a run.

    Args:
        module: The module.
        modes: The mode of each module in it.
        requires_grad: By the name of the parameter.
    """

    module: nn.Module
    modes: Modes
    requires_grad: dict[str, bool]

    @classmethod
    def capture(cls, module: nn.Module) -> ModuleFlags:
        """Return the present flags of a module."""
        flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        return cls(module, get_modes(module), flags)

    def restore(self, *, with_modes: bool) -> None:
        """Set `requires_grad` to what it was, on request the modes too, and drop gradients."""
        if with_modes:
            set_modes(self.modes)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
            parameter.grad = None
