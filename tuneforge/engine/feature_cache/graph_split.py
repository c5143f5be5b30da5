"""Split a model at a cut: the backbone depends only on inputs and frozen weights, the tail computes the rest.

The model is traced in given modes by `torch.fx`, or by `torch.export` where fx fails. A node of the graph is *live* if
a trained parameter, a random operation or a module in training mode reaches it. The cut consists of the values that
live nodes take from the others.
"""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, fx, nn

from tuneforge.engine.model.modes import Modes, set_modes

_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "multinomial", "normal", "poisson"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class NotCacheableError(Exception):
    """There is no backbone worth caching; the message completes `feature cache: off, because ...`."""


class UntraceableError(NotCacheableError):
    """One way of tracing failed; another one may succeed."""


@attrs.frozen(eq=False)
class SplitModel:
    """A model in two parts.

    Args:
        backbone: Computes from prepared inputs the values at the cut, each (b, ...).
        train_tail: Computes the output from these values, in the modes of the phase.
        eval_tail: The same in eval mode.
        trace: The whole model in the modes of the phase.
        cut: Names of the nodes whose values cross from the backbone to the tail.
    """

    backbone: fx.GraphModule
    train_tail: fx.GraphModule
    eval_tail: fx.GraphModule
    trace: Trace
    cut: list[str]

    def find_cut_if_trainable(self, trainable: Iterable[nn.Parameter], example: Any) -> list[str]:
        """Return the cut that the model would have if these parameters trained too.

        Raises:
            NotCacheableError: Nothing would lie before it.
        """
        unfrozen = [parameter for parameter in trainable if not parameter.requires_grad]
        for parameter in unfrozen:
            parameter.requires_grad_(True)
        try:
            return _find_cut(self.trace, example)
        finally:
            for parameter in unfrozen:
                parameter.requires_grad_(False)


@attrs.frozen(eq=False)
class Trace:
    """A traced module: the graph, and the module that its names refer to."""

    graph: fx.Graph
    root: nn.Module

    def extract_backbone(self, cut: Iterable[str]) -> fx.GraphModule:
        """Return the part that computes the values at a cut."""
        by_name = {node.name: node for node in self.graph.nodes}
        crossing = [by_name[name] for name in cut]
        needed = _find_ancestors(crossing, stop=set())
        subgraph = fx.Graph()
        seen: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder" or node in needed:
                seen[node] = subgraph.node_copy(node, seen.__getitem__)
        subgraph.output(tuple(seen[node] for node in crossing))
        return fx.GraphModule(self.root, subgraph)

    def extract_tail(self, cut: Iterable[str]) -> fx.GraphModule:
        """Return the part that computes the output from the values at a cut.

        Raises:
            NotCacheableError: It would need the inputs as well, or this trace has no such nodes.
        """
        by_name = {node.name: node for node in self.graph.nodes}
        if not set(cut) <= set(by_name):
            raise NotCacheableError("the model runs other operations in eval mode")
        crossing = [by_name[name] for name in cut]
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        needed = _find_ancestors([output], stop={*crossing, *filter(_is_batch_size, self.graph.nodes)})
        subgraph = fx.Graph()
        copied = {node: subgraph.placeholder(f"value_{index}") for index, node in enumerate(crossing)}
        for node in self.graph.nodes:
            if node in needed and node not in copied and node is not output:
                if node.op == "placeholder":
                    raise NotCacheableError("the part that trains takes the model's input")
                if _is_batch_size(node):  # every value at the cut has it
                    copied[node] = subgraph.call_function(node.target, (copied[crossing[0]], 0))
                else:
                    copied[node] = subgraph.node_copy(node, copied.__getitem__)
        subgraph.output(fx.map_arg(output.args[0], copied.__getitem__))
        return fx.GraphModule(self.root, subgraph)


def split_model(
    module: nn.Module, example: Any, modes: Modes, *, tracer: Callable[[nn.Module, Any], Any]
) -> SplitModel:
    """Split a model in the modes of a phase, and once more in eval mode at the same cut.

    Args:
        module: Frozen as the phase asks.
        example: Prepared inputs of two samples.
        modes: The modes of the phase.
        tracer: `trace_with_fx` or `trace_with_export`.

    Raises:
        NotCacheableError: There is nothing to cache.
        UntraceableError: The model cannot be traced this way.
    """
    set_modes(modes)
    trace = _trace(module, example, tracer)
    cut = _find_cut(trace, example)
    backbone, train_tail = trace.extract_backbone(cut), trace.extract_tail(cut)
    module.eval()
    return SplitModel(backbone, train_tail, _trace(module, example, tracer).extract_tail(cut), trace, cut)


def trace_with_fx(module: nn.Module, example: Any) -> Trace:
    """Trace the module's Python code with symbolic inputs."""
    del example
    return Trace(fx.Tracer().trace(module), module)


def trace_with_export(module: nn.Module, example: Any) -> Trace:
    """Trace the operations on an example, for any batch size; the graph uses the module's own parameters."""
    free = {0: torch.export.Dim.AUTO}
    given = dict(example) if isinstance(example, Mapping) else {}
    inputs = () if given else (example,)
    shapes: Any = dict.fromkeys(given, free) if given else (free,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = torch.export.export(module, inputs, given, dynamic_shapes=shapes, strict=False).module()
    assert isinstance(root, fx.GraphModule)
    return Trace(root.graph, root)


def _trace(module: nn.Module, example: Any, tracer: Callable[[nn.Module, Any], Trace]) -> Trace:
    before = _rng_states()
    try:
        trace = tracer(module, example)
    except Exception as error:  # noqa: BLE001 - with symbolic inputs the model's code may raise anything
        raise UntraceableError(f"the model cannot be traced ({type(error).__name__})") from None
    if _rng_states() != before:  # a number drawn while tracing would become a constant
        raise NotCacheableError("the model draws random numbers, which a trace would turn into constants")
    return trace


def _rng_states() -> tuple[Any, ...]:
    state: Any = np.random.get_state(legacy=True)
    return random.getstate(), state[1].tobytes(), state[2], torch.get_rng_state().numpy().tobytes()


def _find_cut(trace: Trace, example: Any) -> list[str]:
    """Return the names of the nodes whose values cross from the backbone to the live nodes."""
    graph, live = trace.graph, _find_live_nodes(trace)
    input_dependents = _find_input_dependents(graph)
    values = _ValuePropagation(trace.root, graph).propagate(example)
    while True:
        cut = [node for node in graph.nodes if _crosses_cut(node, live, input_dependents)]
        unbatched = [node for node in cut if not _has_batch_axis(values.get(node.name))]
        if not unbatched:
            break
        live |= set(unbatched)  # such as a shape: the tail computes it again
    names = [node.name for node in cut]
    if not names or all(node.op == "placeholder" for node in cut):
        raise NotCacheableError("no frozen layer lies before the first one that trains")
    return names


def _crosses_cut(node: fx.Node, live: set[fx.Node], input_dependents: set[fx.Node]) -> bool:
    return node not in live and node in input_dependents and any(user in live for user in node.users)


def _has_batch_axis(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 2


def _find_live_nodes(trace: Trace) -> set[fx.Node]:
    """Return the nodes that training changes, and all that depend on them. The output is always live."""
    live: set[fx.Node] = set()
    order = {node: index for index, node in enumerate(trace.graph.nodes)}
    for node in trace.graph.nodes:
        if (
            node.op == "output"
            or _is_trainable_or_random(node, trace.root)
            or any(each in live for each in node.all_input_nodes)
        ):
            live.add(node)
            for written in _find_overwritten(node, trace.root):  # its later readers see the new value
                live |= {user for user in written.users if order[user] > order[node]}
    return live


def _is_trainable_or_random(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "get_attr":
        found: Any = operator.attrgetter(str(node.target))(module)
        return isinstance(found, nn.Parameter) and found.requires_grad
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return child.training or any(parameter.requires_grad for parameter in child.parameters())
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name_of(node).strip("_")
    if name in _RANDOM or node.kwargs.get("training") is True or _has_dropout(name, node):
        return True
    if name == "batch_norm" and isinstance(node.target, torch._ops.OpOverload):
        return bool(node.args[5] is True)  # not `True in args`: cudnn_enabled, the last one, is True as well
    return ("dropout" in name or name in ("stochastic_depth", "batch_norm")) and True in node.args


def _has_dropout(name: str, node: fx.Node) -> bool:
    given = node.args[4] if name == "scaled_dot_product_attention" and len(node.args) > 4 else None
    return node.kwargs.get("dropout_p", given) not in (None, 0, 0.0)


def _name_of(node: fx.Node) -> str:
    """Return the name of what a node calls: `add_` for both `operator` and `aten.add_.Tensor`."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]


def _find_overwritten(node: fx.Node, module: nn.Module) -> list[fx.Node]:
    """Return the nodes whose values this node overwrites in place."""
    target = _name_of(node)
    inplace = node.kwargs.get("inplace") is True
    if node.op == "call_module":
        inplace = bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method" or node.op == "call_function":
        inplace = inplace or (target.endswith("_") and not target.endswith("__")) or node.target in _IN_PLACE
    return node.all_input_nodes[:1] if inplace else []


def _find_input_dependents(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on the input."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _is_batch_size(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.sym_size.int:
        return False
    source, axis = node.args[:2]
    return isinstance(source, fx.Node) and source.op == "placeholder" and bool(axis == 0)


def _find_ancestors(targets: list[fx.Node], *, stop: set[fx.Node]) -> set[fx.Node]:
    """Return all nodes that the targets are computed from, without looking beyond `stop`."""
    found: set[fx.Node] = set()
    waiting = list(targets)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in stop else node.all_input_nodes
    return found


class _ValuePropagation(fx.Interpreter):
    """Computes the value of every node for an example."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)

    def propagate(self, example: Any) -> dict[str, Any]:
        """Return the values by node name; gradients are off, and modules keep their modes."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = (
            {node: example[node.target] for node in inputs if node.target in example}
            if isinstance(example, dict)
            else {}
        )
        with torch.no_grad():
            self.run(*([] if given else [example]), initial_env=given or None)
        return {node.name: value for node, value in self.env.items()}
