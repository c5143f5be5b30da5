"""What comes after a trainable parameter in a model's dataflow: modules, and calls of functional dropout and norms.

Autograd answers this: where gradients are enabled, a tensor requires one exactly if a trainable parameter comes first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.modes import Modes, set_modes

_NORM_FUNCTIONS = {functional.batch_norm: "training", functional.instance_norm: "use_input_stats"}
_TRAINING_ARGUMENTS: dict[Any, str] = _NORM_FUNCTIONS | dict.fromkeys(
    [
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        functional.rrelu,
    ],
    "training",
)
"""The argument by which a function is told that it is called in training."""


class FreezeFunctions(TorchFunctionMode):
    """Functional dropout and norms behave as in eval mode where nothing trainable comes before them.

    A module in training mode may call them on the output of its frozen layers: the mode of the module cannot tell.

    Args:
        norms: False to leave norms alone.

    Attributes:
        num_frozen: Calls that were made to behave as in eval mode.
    """

    def __init__(self, *, norms: bool) -> None:
        super().__init__()
        self.num_frozen = 0
        self._norms, self._trainable_seen = norms, False

    def __enter__(self) -> Any:
        self._trainable_seen = False
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch is not typed here

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, with its argument for training set to False where nothing trainable comes before it."""
        kwargs = kwargs or {}
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        self._trainable_seen |= any(isinstance(each, nn.Parameter) and each.requires_grad for each in tensors)
        argument = _TRAINING_ARGUMENTS.get(func)
        if argument is not None and kwargs.get(argument) and self._is_frozen(func, args, tensors):
            self.num_frozen += 1
            kwargs = {**kwargs, argument: False}
        return func(*args, **kwargs)

    def _is_frozen(self, func: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        parameters = [each for each in tensors if isinstance(each, nn.Parameter)]
        if func in _NORM_FUNCTIONS:
            if not self._norms or len(args) < 2 or args[1] is None:  # without running statistics both modes are alike
                return False
            if parameters:
                return not all(each.requires_grad for each in parameters)
        # Within torch.no_grad() autograd cannot answer, so what was called before decides.
        return not (_requires_grad(tensors) if torch.is_grad_enabled() else self._trainable_seen)


def find_function_mode(module: nn.Module, example: Any, modes: Modes, *, norms: bool) -> FreezeFunctions | None:
    """Return the mode in which a phase has to call its model, or None if no call of a function would differ.

    Args:
        module: The model, after `freeze`.
        example: Prepared inputs.
        modes: The mode of each module while the phase trains.
        norms: As for `FreezeFunctions`.
    """
    mode = FreezeFunctions(norms=norms)
    with preserve_state(module), torch.enable_grad(), mode:
        set_modes(modes)
        with contextlib.suppress(Exception):  # a module that needs more than inputs in training fails here
            _call(module, example)
    return mode if mode.num_frozen else None


def find_trainable_inputs(module: nn.Module, example: Any) -> dict[nn.Module, bool]:
    """Return for each module without parameters that ran whether a trainable parameter lies before it.

    The module runs in eval mode, then in training mode if that left some modules out. It is left as it was.
    """
    observer = _Observer()
    with (
        preserve_state(module),
        torch.enable_grad(),
        observer.on(module),
    ):
        module.eval()
        _call(module, example)
        if observer.missing:
            module.train()
            with contextlib.suppress(Exception):  # in training it may need more than inputs, such as targets
                _call(module, example)
    return observer.found


class _Observer:
    """Forward hooks that record whether a trainable parameter lies before a module.

    Attributes:
        found: The answer for each module without parameters that ran.
        missing: Those that have not run.
    """

    def __init__(self) -> None:
        self.found: dict[nn.Module, bool] = {}
        self.missing: set[nn.Module] = set()
        self._trainable_ran = False

    @contextlib.contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Observe a module and all modules in it."""
        handles = []
        try:
            for child in module.modules():
                if isinstance(child, torch.jit.ScriptModule):  # it takes no hooks
                    continue
                if next(child.parameters(), None) is None:
                    self.missing.add(child)
                handles.append(child.register_forward_pre_hook(self._observe, with_kwargs=True))
            with torch.enable_grad(), _KeepGradients():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._trainable_ran |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if module in self.missing or module in self.found:
            # Within torch.inference_mode() autograd cannot answer, so what ran before decides.
            reached = _requires_grad((*args, *kwargs.values())) if torch.is_grad_enabled() else self._trainable_ran
            self.found[module] = self.found.get(module, False) or reached
            self.missing.discard(module)


class _KeepGradients(TorchFunctionMode):
    """Gradients stay enabled: autograd sees the dataflow through a part of the model that runs under no_grad."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, unless it switches gradients off."""
        if func is torch._C._set_grad_enabled and args == (False,):
            return None
        return func(*args, **(kwargs or {}))


def _call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        return any(map(_requires_grad, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_requires_grad, value))
