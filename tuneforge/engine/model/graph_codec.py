"""The operations and arguments of a module's graph as JSON, limited to functions of tensors."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

from tuneforge.errors import FolderError

_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos", "abs", "invert", "getitem",
    "and_", "or_", "xor", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge", "iadd", "isub", "imul", "itruediv",
)  # fmt: skip
_FACTORIES = ("arange", "zeros", "ones", "full", "empty", "tensor", "eye", "linspace", "scalar_tensor")
_SYMBOLIC = ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sqrt")
_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag", "data", "is_cuda")
_NAMED_TYPES = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


class NotPortableError(Exception):
    """A module has no graph; the message says why, in a clause."""


def encode(value: Any) -> Any:
    """Return an argument of a node as plain data.

    Raises:
        NotPortableError: It is of a type that a graph cannot hold.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": "input" if value.type != "meta" else "meta"}
    for kind, cls in _NAMED_TYPES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise NotPortableError(f"it uses a constant of type {type(value).__name__}")


def decode(value: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    """Return the argument that `encode` described.

    Args:
        value: Plain data.
        values: The values of the nodes before.
        device: The device of the inputs, which stands for that on which the module was traced.
    """
    if isinstance(value, list):
        return [decode(item, values, device) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return values[held]
    if kind in ("tuple", "slice"):
        parts = [decode(item, values, device) for item in held]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "dict":
        return {decode(key, values, device): decode(item, values, device) for key, item in held}
    if kind == "float":
        return float(held)
    if kind == "device":
        return device if held == "input" else torch.device(held)
    return Ellipsis if kind == "ellipsis" else getattr(torch, held)


def list_references(value: Any) -> Iterator[str]:
    """Yield the names of the nodes that an argument refers to."""
    if isinstance(value, list):
        for item in value:
            yield from list_references(item)
    elif isinstance(value, dict):
        if "node" in value:
            yield value["node"]
        else:
            yield from list_references([item for item in value.values() if isinstance(item, list)])


def name_function(function: Any) -> str:
    """Return the name under which a graph calls a function.

    Raises:
        NotPortableError: It is no function of tensors that PyTorch has.
    """
    if isinstance(function, torch._ops.OpOverload):
        if _is_tensor_operation(str(function)):
            return str(function)
    elif function is getattr:
        return "getattr"
    elif name := next((name for name, known in _functions().items() if known is function), ""):
        return name
    raise NotPortableError(f"it calls {getattr(function, '__name__', function)}, which is not a function of tensors")


def find_function(node: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Return what a node calls; None for a node that calls nothing.

    Raises:
        FolderError: It is not a function of tensors.
    """
    target = node["target"]
    if node["op"] == "call_method" and not target.startswith("_") and hasattr(Tensor, target):
        return functools.partial(_call_method, target)
    if node["op"] == "call_function" and _is_tensor_operation(target):
        _, packet, overload = target.split(".")
        found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
        return found
    if node["op"] == "call_function" and target in _functions():
        return _functions()[target]
    if node["op"] in ("placeholder", "get_attr", "output"):
        return None
    raise _unknown_error(target)


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that a graph may call, by name: those of tensors, which open no file and run no code."""
    found: dict[str, Callable[..., Any]] = {}
    overridable = get_overridable_functions()
    for namespace in (torch, F, torch.functional, torch.linalg, torch.fft, torch.special):
        for function in overridable.get(namespace, ()):
            found.setdefault(f"{namespace.__name__}.{function.__name__}", function)
    found |= {f"operator.{name}": getattr(operator, name) for name in _OPERATORS}
    found |= {f"torch.{name}": getattr(torch, name) for name in (*_FACTORIES, *_SYMBOLIC) if hasattr(torch, name)}
    return {**found, "getattr": _get_attribute}


def _get_attribute(value: Any, name: str) -> Any:
    if name not in _ATTRIBUTES or not isinstance(value, Tensor):
        raise _unknown_error(name)
    return getattr(value, name)


def _call_method(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(value, (Tensor, torch.Size)):
        raise _unknown_error(name)
    return getattr(value, name)(*args, **kwargs)


def _is_tensor_operation(name: str) -> bool:
    return name.startswith("aten.") and name.count(".") == 2 and "from_file" not in name


def _unknown_error(name: str) -> FolderError:
    return FolderError(
        f"the graph of the model calls '{name}'",
        why="only functions of tensors are allowed, because others could run code",
        fix="restore the file, or train again",
    )
