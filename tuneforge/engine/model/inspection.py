"""Inspections: passes through a model that are no part of training, and leave nothing behind.

An inspection may change all that a module holds: parameters, buffers, modes, hooks, plain attributes of any depth, and
the state of random generators. `StateCopy` copies it, names what has changed since, and restores it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import random
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tuneforge.engine.model.fsdp import is_sharded
from tuneforge.engine.model.module_state import bitwise_equal

_REGISTERED = ("_parameters", "_buffers", "_modules")
_INTERNAL = frozenset(vars(nn.Module()))
_OPAQUE = ("torch", "numpy", "pandas", "tuneforge.engine", "tuneforge.plugin", "threading", "_thread", "logging")
"""Packages whose objects are compared by identity: they are no state of a user's model, or too large to copy."""
_PLAIN = (bool, int, float, str, bytes, complex)
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


class StateCopy:
    """A copy of all that some objects hold.

    Args:
        roots: The objects by the path that messages name them by; "" for the module itself.
        copy: False to refer to tensors and arrays instead of copying them.
        values: False to compare parameters and buffers by identity; then they cannot be restored.
        known: Objects that this copy holds are left out.

    Attributes:
        leaves: Every number, text, tensor and so on, by its path, such as `layer1.0.scale` or `.stats['steps']`.
        registered: Paths of parameters and buffers.
        parameters: Paths of parameters.
    """

    def __init__(
        self, roots: Mapping[str, Any], *, copy: bool = True, values: bool = True, known: StateCopy | None = None
    ) -> None:
        self.leaves: dict[str, Any] = {}
        self.registered: set[str] = set()
        self.parameters: set[str] = set()
        self._roots, self._copy, self._values, self._known = roots, copy, values, known
        self._paths: dict[int, str] = {} if known is None else dict(known._paths)
        self._holders: list[tuple[Any, Any]] = []
        self._empty: list[dict[Any, Any]] = []
        self._tensors: list[tuple[str, Tensor, Tensor | None, bool]] = []  # with its gradient, and whether it is a leaf
        self._modes: list[tuple[nn.Module, bool]] = []
        for path, root in roots.items():
            self._visit(path, root)

    def changes(self, *, parameters: bool = True) -> dict[str, Any]:
        """Return the leaves that are no longer what they were, by path, with clones of changed tensors.

        Args:
            parameters: False to leave out the values of parameters, which are the largest part.
        """
        now = StateCopy(self._roots, copy=False, values=self._values, known=self._known).leaves
        before, skipped = self.leaves, set() if parameters else self.parameters
        return {
            path: each.detach().clone() if isinstance(each, Tensor) else each
            for path, each in [*now.items(), *((path, None) for path in before if path not in now)]
            if path not in now or path not in before or not (path in skipped or same_leaf(each, before[path]))
        }

    def restore(self, changes: Mapping[str, Any] | None = None) -> None:
        """Restore everything, in the same objects; where `changes` are known, only the tensors among them."""
        for holder, content in self._holders:
            _restore_holder(holder, content)
        for each in filter(None, self._empty):
            each.clear()
        with torch.no_grad():
            for path, tensor, gradient, is_leaf in self._tensors:
                value = self.leaves[path]
                if is_leaf and not tensor.is_leaf:
                    tensor.detach_()
                if (changes is None or path in changes) and not same_leaf(tensor.detach(), value):
                    if tensor.shape == value.shape:
                        tensor.copy_(value)
                    else:
                        tensor.data = value.clone()
                if tensor.is_leaf:
                    tensor.grad = gradient
                    tensor.requires_grad_(self.leaves[f"requires_grad of {path}"])
        for module, training in self._modes:
            module.training = training

    def _visit(self, path: str, value: Any) -> None:
        if value is None or isinstance(value, _PLAIN):
            self.leaves[path] = value
        elif id(value) in self._paths:
            self.leaves[path] = ("the same object as", self._paths[id(value)])
        else:
            self._paths[id(value)] = path
            self._visit_object(path, value)

    def _visit_object(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(path, value)
        elif isinstance(value, np.ndarray):
            self.leaves[path] = value.copy() if self._copy else value
            self._hold(value, self.leaves[path])
        elif isinstance(value, _GENERATORS):
            self.leaves[path] = repr(_generator_state(value))
            self._hold(value, _generator_state(value))
        elif isinstance(value, torch.jit.ScriptModule):
            self._modes.append((value, value.training))
            for name, tensor in [*value.named_parameters(), *value.named_buffers()]:
                self._visit_registered(_join(path, name), tensor)
        elif isinstance(value, nn.Module):
            self._visit_module(path, value)
        else:
            self._visit_container(path, value)

    def _visit_module(self, path: str, module: nn.Module) -> None:
        if not any(is_lazy(each) for each in module._parameters.values() if each is not None):
            self._hold(vars(module), dict(vars(module)))
        for key, value in list(vars(module).items()):
            if key in _INTERNAL and not value:
                if isinstance(value, dict):
                    self._empty.append(value)
                continue
            if key not in _REGISTERED:
                if key != "training":  # restored, but no difference: passes in other modes are compared
                    self._visit(_join(path, key), value)
                continue
            if not (key == "_parameters" and any(each is not None and is_sharded(each) for each in value.values())):
                self._hold(value, dict(value))  # FSDP itself replaces sharded parameters in a pass
            visit = self._visit if key == "_modules" else self._visit_registered
            for name, each in list(value.items()):
                visit(_join(path, name), each)
        for cls in type(module).__mro__:
            if not _is_opaque(cls) and id(cls) not in self._paths:
                self._paths[id(cls)] = path
                plain = {key: each for key, each in vars(cls).items() if isinstance(each, (bool, int, float, str))}
                self._hold(cls, plain)
                self.leaves |= {f"{cls.__qualname__}.{key}": each for key, each in plain.items()}

    def _visit_container(self, path: str, value: Any) -> None:
        if isinstance(value, (dict, list, deque, set)):
            self._hold(value, dict(value) if isinstance(value, dict) else value.copy())
        if isinstance(value, dict):
            keys = [repr(key) if isinstance(key, _PLAIN) else str(place) for place, key in enumerate(value)]
            children = dict(zip([f"{path}[{key}]" for key in keys], value.values(), strict=True))
        elif isinstance(value, (list, tuple, deque)):
            children = {f"{path}[{place}]": each for place, each in enumerate(value)}
        else:
            children = self._attributes(path, value)
        if children or isinstance(value, (dict, list, tuple, deque)):
            self.leaves[path] = type(value)
        else:
            self.leaves[path] = value.copy() if isinstance(value, set) else value
        for below, each in children.items():
            self._visit(below, each)

    def _attributes(self, path: str, value: Any) -> dict[str, Any]:
        """Return the attributes of an object of a user's class by path; they are restored with it."""
        if isinstance(value, _CODE) or _is_opaque(type(value)):
            return {}
        attributes = dict(getattr(value, "__dict__", {}))
        if attributes:
            self._hold(vars(value), dict(attributes))
        names = {name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)}
        slots = {name: getattr(value, name) for name in sorted(names)}
        if slots:
            self._hold(_Slots(value), slots)
        return {_join(path, name): each for name, each in (attributes | slots).items()}

    def _hold(self, holder: Any, content: Any) -> None:
        if self._copy:
            self._holders.append((holder, content))

    def _visit_registered(self, path: str, tensor: Tensor | None) -> None:
        self.registered |= {path, f"requires_grad of {path}"}
        if isinstance(tensor, nn.Parameter):
            self.parameters.add(path)
        if self._values:
            self._visit(path, tensor)
        else:
            self.leaves[path] = id(tensor)

    def _add_tensor(self, path: str, tensor: Tensor) -> None:
        if is_lazy(tensor) or tensor.device.type == "meta":
            self.leaves[path] = type(tensor)
            return
        self.leaves[path] = tensor.detach().clone() if self._copy else tensor.detach()
        self.leaves[f"requires_grad of {path}"] = tensor.requires_grad
        if self._copy:
            self._tensors.append((path, tensor, tensor.grad if tensor.is_leaf else None, tensor.is_leaf))


class _Slots:
    """An object whose attributes lie in slots."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner


@contextlib.contextmanager
def preserve_state(module: nn.Module, others: Mapping[str, Any] = types.MappingProxyType({})) -> Iterator[StateCopy]:
    """Restore afterwards all that a module and other objects hold, and the state of every random generator.

    Args:
        module: The module.
        others: Further objects, by name.
    """
    before, generators = StateCopy({"": module, **others}), rng_states()
    try:
        yield before
    finally:
        before.restore()
        restore_rng_states(generators)


@contextlib.contextmanager
def silence_tracing() -> Iterator[None]:
    """Drop logs, warnings and standard error: `torch.export` prints a whole graph where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def rng_states() -> tuple[Any, ...]:
    """Return the states of the random generators of Python, numpy and torch."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch does not annotate it
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_cuda


def restore_rng_states(states: tuple[Any, ...]) -> None:
    """Restore what `rng_states` returned."""
    python, legacy, on_cpu, on_cuda = states
    random.setstate(python)
    np.random.set_state(legacy)
    torch.set_rng_state(on_cpu)
    if on_cuda:
        torch.cuda.set_rng_state_all(on_cuda)


def same_rng_states(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Return True if nothing was drawn between two states."""
    return (
        one[0] == other[0]
        and one[1][2] == other[1][2]
        and np.array_equal(one[1][1], other[1][1])
        and all(map(torch.equal, [one[2], *one[3]], [other[2], *other[3]]))
    )


def same_leaf(one: Any, other: Any) -> bool:
    """Return True if two leaves are equal: tensors bit for bit, other objects by value if they are plain."""
    if one is other:
        return True
    if type(one) is not type(other):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and _same_tensor(one, other)
    if isinstance(one, Tensor):
        return _same_tensor(one, other)
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if isinstance(one, float):
        return repr(one) == repr(other)  # NaN equals itself, and 0.0 is not -0.0
    plain = (bool, int, str, bytes, complex, tuple, set, frozenset, torch.dtype, torch.device)
    return isinstance(one, plain) and bool(one == other)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    return bitwise_equal(one, other)


def _restore_holder(holder: Any, content: Any) -> None:
    if isinstance(holder, _Slots):
        for name, value in content.items():
            if getattr(holder.owner, name, None) is not value:
                object.__setattr__(holder.owner, name, value)
    elif isinstance(holder, type):
        for name, value in content.items():
            if vars(holder).get(name) is not value:
                setattr(holder, name, value)
    elif isinstance(holder, np.ndarray):
        holder[...] = content
    elif isinstance(holder, _GENERATORS):
        _set_generator_state(holder, content)
    elif isinstance(holder, dict):
        same = len(holder) == len(content) and all(map(operator.is_, holder.values(), content.values()))
        if not same or list(holder) != list(content):
            kind = OrderedDict if isinstance(holder, OrderedDict) else dict
            kind.clear(holder)
            for key, value in content.items():
                kind.__setitem__(holder, key, value)
    else:
        holder.clear()
        holder.update(content) if isinstance(holder, set) else holder.extend(content)


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, torch.Generator):
        generator.set_state(torch.tensor(state, dtype=torch.uint8))
    else:
        generator.setstate(state) if isinstance(generator, random.Random) else generator.set_state(state)


def _is_opaque(cls: type) -> bool:
    return cls.__module__ == "builtins" or any(
        cls.__module__ == each or cls.__module__.startswith(each + ".") for each in _OPAQUE
    )


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return tuple(each for each in ((slots,) if isinstance(slots, str) else slots) if not each.startswith("__"))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)
