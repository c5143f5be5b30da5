"""Plain attributes of a model that change while it trains: counters, temperatures, running means without a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tuneforge.engine.model.inspection import StateCopy
from tuneforge.errors import UsageError

_NUMBERS_AND_TEXT = (bool, int, float, str)
_STATE_TYPES = (*_NUMBERS_AND_TEXT, complex, bytes, set, np.ndarray, np.generic)


class AttributeState:
    """What changes in the attributes of a module, its submodules and their objects, beside parameters and buffers.

    Args:
        module: The module, as it is when the run begins.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, StateCopy({"": module}, values=False)

    def state(self) -> dict[str, Any]:
        """Return the attributes that have changed by path, and the paths of those that a checkpoint cannot hold.

        Results of a forward pass that an attribute refers to with their graph are left out.
        """
        values: dict[str, Any] = {}
        unsaved: list[str] = []
        for leaf, new in self._before.changes().items():
            path = leaf.partition("[")[0]
            if leaf in self._before.registered or leaf.startswith("requires_grad of ") or path in values:
                continue
            value = _get_attribute(self._module, path)
            if _is_storable(value):
                values[path] = _detach(value)
            elif isinstance(new, _STATE_TYPES) or (isinstance(new, Tensor) and not _has_graph(value)):
                unsaved.append(leaf)
        return {"values": values, "unsaved": unsaved}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the attributes that `state` returned.

        Raises:
            UsageError: Some could not be saved.
        """
        if state["unsaved"]:
            raise UsageError(
                f"the checkpoint does not hold '{state['unsaved'][0]}' of the model",
                why="it changed while the model trained, and lies in an object that is no plain data",
                fix="store it as a buffer, as a plain attribute of a module, or with get_extra_state; then train anew",
            )
        for path, value in state["values"].items():
            owner, _, name = path.rpartition(".")
            before = _get_attribute(self._module, path)
            is_moved = isinstance(value, Tensor) and isinstance(before, Tensor)
            setattr(_get_attribute(self._module, owner), name, value.to(before.device) if is_moved else value)


def _get_attribute(module: nn.Module, path: str) -> Any:
    """Return the attribute at a path, or None if there is none."""
    owner: Any = module
    for name in path.split(".") if path else ():
        owner = getattr(owner, name, None)
    return owner


def _is_storable(value: Any) -> bool:
    """Return True for numbers, text, tensors without a graph, and lists and mappings of them."""
    if isinstance(value, Tensor):
        return type(value) is Tensor and not _has_graph(value)
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_storable, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_storable(each) for key, each in value.items())
    return type(value) in _NUMBERS_AND_TEXT


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _detach(value: Any) -> Any:
    """Return a value with clones of its tensors, which forward may change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_detach, value))
    return {key: _detach(each) for key, each in value.items()} if isinstance(value, dict) else value
