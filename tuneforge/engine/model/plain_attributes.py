"""Plain attributes of a model that change while it trains: counters, temperatures, running means without a buffer."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Mapping
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
        others: Further objects whose methods may read its attributes, such as callbacks.
    """

    def __init__(self, module: nn.Module, others: Iterable[object] = ()) -> None:
        self._module, self._before = module, StateCopy({"": module}, values=False)
        self._classes = {type(each) for each in (*module.modules(), *others)}

    def state(self) -> dict[str, Any]:
        """Return the attributes that have changed by path, and the paths of those that a checkpoint cannot hold.

        Left out are results of a forward pass that an attribute refers to with their graph, and numbers that the model
        and the other objects count up and never read: they decide nothing, and count what this process did.
        """
        values: dict[str, Any] = {}
        unsaved: list[str] = []
        for leaf, new in self._before.changes().items():
            path = leaf.partition("[")[0]
            if leaf in self._before.registered or leaf.startswith("requires_grad of ") or path in values:
                continue
            value = _get_attribute(self._module, path)
            if type(value) in (int, float) and self._is_only_counted(path.rpartition(".")[2]):
                continue
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

    def _is_only_counted(self, name: str) -> bool:
        uses = [_attribute_uses(cls) for cls in self._classes]  # type: ignore[arg-type]  # mypy: a class has no hash
        return any(name in counted for counted, _ in uses) and not any(name in read for _, read in uses)


@functools.cache
def _attribute_uses(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return the attributes that methods of a class change by `+=` and the like, and those that they read otherwise."""
    counted: set[str] = set()
    read: set[str] = set()
    users = [each for each in cls.__mro__ if each.__module__.partition(".")[0] not in ("torch", "builtins")]
    values = [getattr(each, "__func__", getattr(each, "fget", each)) for user in users for each in vars(user).values()]
    codes = [each.__code__ for each in values if hasattr(each, "__code__")]
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, types.CodeType)]
        read.update(each for each in code.co_consts if isinstance(each, str))  # perhaps for getattr
        before = ""
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                (counted if before == "COPY" else read).add(instruction.argval)
            before = instruction.opname
    return frozenset(counted), frozenset(read)


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
