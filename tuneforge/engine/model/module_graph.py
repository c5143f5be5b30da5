"""The forward pass of a module as a graph of plain data, from which another process computes without its Python code.

The graph is traced in eval mode, by `torch.fx` through all layers, or by `torch.export` where that fails, and is used
only if its logits equal those of the module at two batch sizes. JSON holds the graph, safetensors the tensors: nothing
is pickled, and a graph can call nothing but functions of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tuneforge.engine.data.dataset import map_inputs, named_tensors
from tuneforge.engine.model.graph_codec import (
    NotPortableError,
    decode,
    encode,
    find_function,
    list_references,
    name_function,
)
from tuneforge.engine.model.inspection import preserve_state, silence_tracing
from tuneforge.engine.model.model import call_module, extract_logits
from tuneforge.engine.storage.safetensors_io import is_storable

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CHECKS = ("_assert", "_guards_fn", "sym_constrain", "_check")
"""Parts of the names of nodes that only check what was true of the traced inputs."""


@attrs.frozen(eq=False)
class ModuleGraph:
    """A graph, as plain data that JSON can hold.

    Args:
        inputs: Names of the inputs in order; "" for a single tensor.
        nodes: Each operation: `name`, `op`, `target`, `args` and `kwargs`.
        state: Names of the tensors of the state dict, each shared one once.
        parameters: Those of them that are parameters; the others are buffers.
        aliases: Further names of shared tensors, with the name under which each is stored.
        constants: Tensors that are in no state dict, by name.
    """

    inputs: tuple[str, ...]
    nodes: tuple[Mapping[str, Any], ...]
    state: tuple[str, ...]
    parameters: tuple[str, ...]
    aliases: Mapping[str, str]
    constants: Mapping[str, Tensor]

    @classmethod
    def trace(cls, module: nn.Module, example: Any) -> ModuleGraph:
        """Return the graph of the module's logits in eval mode, checked on batches of two and of three samples.

        Args:
            module: Left as it was, with its buffers, attributes and modes.
            example: Prepared inputs of two samples.

        Raises:
            NotPortableError: It cannot be traced, or the graph does not compute what the module computes.
        """
        batches = [example, map_inputs(example, lambda tensor: torch.cat([tensor[:1], tensor]))]
        with preserve_state(module), silence_tracing(), torch.no_grad():
            module.eval()
            reason = ""
            for tracer in (_trace_with_fx, _trace_with_export):
                try:
                    graph = _encode_graph(*tracer(module, example), module, tuple(named_tensors(example)))
                    graph.check(module, batches)
                except Exception as error:  # noqa: BLE001 - with symbolic inputs the module's code may raise anything
                    reason = reason or _first_line(error)
                else:
                    return graph
        raise NotPortableError(reason)

    def check(self, module: nn.Module, batches: Iterable[Any]) -> None:
        """Compare the graph with the module in its present state, in eval mode.

        Raises:
            NotPortableError: Their logits differ.
        """
        with preserve_state(module), silence_tracing(), torch.no_grad():
            module.eval()
            rebuilt = self.build(module.state_dict())
            for batch in batches:
                expected, found = (extract_logits(call_module(each, batch)) for each in (module, rebuilt))
                if found.shape != expected.shape or not torch.allclose(
                    found.float(), expected.float(), rtol=1e-4, atol=1e-5, equal_nan=True
                ):
                    raise NotPortableError("its logits change with something that a graph cannot hold")

    def build(self, state: Mapping[str, Tensor]) -> GraphModule:
        """Return a module that computes the graph with the tensors of a state dict, which are not copied."""
        return GraphModule(self, state)

    def to_record(self) -> dict[str, Any]:
        """Return the graph without its constants, as plain data."""
        return {
            "inputs": list(self.inputs),
            "state": list(self.state),
            "parameters": list(self.parameters),
            "aliases": dict(self.aliases),
            "nodes": [dict(node) for node in self.nodes],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], constants: Mapping[str, Tensor]) -> ModuleGraph:
        """Return the graph that `to_record` described."""
        return cls(
            inputs=tuple(record["inputs"]),
            nodes=tuple(record["nodes"]),
            state=tuple(record["state"]),
            parameters=tuple(record["parameters"]),
            aliases=dict(record["aliases"]),
            constants=dict(constants),
        )


class GraphModule(nn.Module):
    """A module that computes a `ModuleGraph`; its parameters and buffers have the names of the original module.

    Raises:
        FolderError: The graph calls something that is not a function of tensors, or lacks a tensor.
    """

    def __init__(self, graph: ModuleGraph, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._inputs = graph.inputs
        held = {name: _as_member(state[name], name in graph.parameters) for name in graph.state}
        held |= {alias: held[name] for alias, name in graph.aliases.items() if name in held}
        for name, tensor in held.items():
            _add_tensor(self, name, tensor, persistent=True)
        for name, tensor in graph.constants.items():
            _add_tensor(self, name, tensor, persistent=False)
        self._nodes = graph.nodes
        self._functions = [find_function(node) for node in graph.nodes]
        self._released = _last_uses(graph.nodes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of PyTorch
        self._functions = [find_function(node) for node in self._nodes]

    def forward(self, *tensors: Any, **named: Any) -> Any:
        """Return the logits (b, k); inputs are passed as to the original module."""
        given = tensors or tuple(named[name] for name in self._inputs)
        device = given[0].device
        values: dict[str, Any] = {}
        remaining = iter(given)
        for node, function, released in zip(self._nodes, self._functions, self._released, strict=True):
            name, op = node["name"], node["op"]
            if op == "placeholder":
                values[name] = next(remaining)
            elif op == "get_attr":
                values[name] = operator.attrgetter(node["target"])(self)
            elif op == "output":
                return extract_logits(decode(node["args"], values, device)[0])
            else:
                args, kwargs = decode(node["args"], values, device), decode(node["kwargs"], values, device)
                assert function is not None
                values[name] = function(*args, **kwargs)
            for used in released:
                del values[used]
        raise AssertionError("unreachable: a graph ends with its output")


class _Logits(nn.Module):
    """The logits of a module for a single input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Any) -> Any:
        output = self.module(inputs)
        return output if isinstance(output, (Tensor, fx.Proxy)) else extract_logits(output)


class _LogitsOfNamed(nn.Module):
    """The logits of a module for several inputs by name."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: Tensor) -> Any:
        return extract_logits(call_module(self.module, dict(zip(self.names, tensors, strict=True))))


class _LayerTracer(fx.Tracer):
    """Traces through the layers of PyTorch too, so that no module is needed to compute the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if type(m) in _BATCH_NORMS and m.running_mean is not None:  # its forward asks how many axes the input has
            norm: Any = m
            state = norm.running_mean, norm.running_var, norm.weight, norm.bias
            return F.batch_norm(args[0], *state, momentum=norm.momentum or 0.0, eps=norm.eps)
        return super().call_module(m, forward, args, kwargs)


def _trace_with_fx(module: nn.Module, example: Any) -> tuple[fx.Graph, nn.Module]:
    if not isinstance(example, Tensor):
        raise NotPortableError("it takes several inputs")
    root = _Logits(module).eval()
    return _LayerTracer().trace(root), root


def _trace_with_export(module: nn.Module, example: Any) -> tuple[fx.Graph, nn.Module]:
    named = named_tensors(example)
    single = isinstance(example, Tensor)
    root = (_Logits(module) if single else _LogitsOfNamed(module, tuple(named))).eval()
    free = {0: torch.export.Dim.AUTO}
    shapes: Any = (free,) if single else (tuple(free for _ in named),)
    traced = torch.export.export(root, tuple(named.values()), dynamic_shapes=shapes, strict=False).module()
    assert isinstance(traced, fx.GraphModule)
    return traced.graph, traced


def _encode_graph(graph: fx.Graph, root: nn.Module, module: nn.Module, inputs: tuple[str, ...]) -> ModuleGraph:
    """Return the graph as plain data, with the tensors of the module by the names of its state dict."""
    state = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    first_names: dict[int, str] = {}
    aliases = {
        name: first for name, tensor in state.items() if (first := first_names.setdefault(id(tensor), name)) != name
    }
    constants: dict[str, Tensor] = {}
    nodes = []
    for node in graph.nodes:
        if any(word in f"{node.name} {node.target}" for word in _CHECKS) and not node.users and node.op != "output":
            continue
        target = str(node.target)
        if node.op == "get_attr":
            target = _name_tensor(operator.attrgetter(target)(root), target, first_names, constants)
        elif node.op == "call_function":
            target = name_function(node.target)
        elif node.op == "call_module":
            raise NotPortableError(f"it calls {type(root.get_submodule(target)).__name__} as a whole")
        encoded = {"name": node.name, "op": node.op, "target": target}
        nodes.append({**encoded, "args": encode(tuple(node.args)), "kwargs": encode(dict(node.kwargs))})
    parameters = tuple(name for name, _ in module.named_parameters(remove_duplicate=False))
    stored = tuple(name for name in state if name not in aliases)
    return ModuleGraph(inputs, tuple(nodes), stored, parameters, aliases, constants)


def _name_tensor(found: Any, path: str, names: Mapping[int, str], constants: dict[str, Tensor]) -> str:
    """Return the name of a tensor in the state dict; one that is not there becomes a constant."""
    if not isinstance(found, Tensor):
        raise NotPortableError(f"it uses {type(found).__name__} '{path}'")
    if id(found) in names:
        return names[id(found)]
    if not is_storable(found):
        raise NotPortableError(f"its constant '{path}' has type {found.dtype}")
    path = path.removeprefix("module.")
    constants[path] = found.detach()
    return path


def _last_uses(nodes: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return the values that can be dropped after each node."""
    last: dict[str, int] = {}
    for place, node in enumerate(nodes):
        last[node["name"]] = place
        last |= dict.fromkeys(list_references([node["args"], node["kwargs"]]), place)
    released: list[list[str]] = [[] for _ in range(len(set(last)) and max(last.values()) + 1)]
    for name, place in last.items():
        released[place].append(name)
    return released


def _as_member(tensor: Tensor, is_parameter: bool) -> Tensor:
    return nn.Parameter(tensor.detach(), requires_grad=False) if is_parameter else tensor.detach()


def _add_tensor(root: nn.Module, path: str, tensor: Tensor, *, persistent: bool) -> None:
    """Register a parameter or a buffer under a path, in modules that are created on the way."""
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(name, tensor)
    else:
        owner.register_buffer(name, tensor, persistent=persistent)


def _first_line(error: Exception) -> str:
    if isinstance(error, NotPortableError):
        return str(error)
    line = str(error).strip().partition("\n")[0]
    return f"it cannot be traced, {type(error).__name__}: {line}"[:200]
