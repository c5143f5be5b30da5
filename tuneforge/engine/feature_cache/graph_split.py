"""Split a model at a cut: the backbone depends only on inputs and frozen weights, the tail computes the rest.

The model is traced in given modes by `torch.fx`, or by `torch.export` where fx fails. A node of the graph is *live* if
a trained parameter, a random operation or a module in training mode reaches it. The cut consists of the values that
live nodes take from the others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import fx, nn

from tuneforge.engine.data.tensor_tree import clone_inputs
from tuneforge.engine.feature_cache.value_propagation import ValuePropagation
from tuneforge.engine.model.inspection import StateCopy, rng_states, same_rng_states, silence_tracing
from tuneforge.engine.model.modes import Modes, set_modes

_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "multinomial", "normal", "poisson"}


class NotCacheableError(Exception):
    """There is no backbone worth caching; the message completes `feature cache: off, because ...`."""


class UntraceableError(NotCacheableError):
    """One way of tracing failed; another one may succeed."""


@attrs.frozen
class Cut:
    """Where a traced model is cut.

    Args:
        crossing: Names of the nodes whose values cross from the backbone to the tail.
        live: Names of the nodes that the tail runs.
    """

    crossing: tuple[str, ...]
    live: frozenset[str]


@attrs.frozen(eq=False)
class SplitModel:
    """A model in two parts.

    Args:
        backbone: Computes from prepared inputs the values at the cut, each (b, ...).
        train_tail: Computes the output from these values, in the modes of the phase.
        eval_tail: The same in eval mode.
        trace: The whole model in the modes of the phase.
        cut: Where it is cut.
    """

    backbone: fx.GraphModule
    train_tail: fx.GraphModule
    eval_tail: fx.GraphModule
    trace: Trace
    cut: Cut

    @property
    def bytes_per_sample(self) -> int:
        """Size of the features of one sample."""
        return sum(self.trace.values.num_bytes[name] for name in self.cut.crossing)

    @property
    def backbone_macs(self) -> float:
        """Multiply-accumulates of the backbone for one sample."""
        return sum(self.trace.values.macs.get(node.name, 0.0) for node in self.backbone.graph.nodes)

    def find_cut_if_trainable(self, trainable: Iterable[nn.Parameter]) -> Cut:
        """Return the cut that the model would have if these parameters trained too.

        Raises:
            NotCacheableError: Nothing would lie before it, or the present backbone overwrites one of its values.
        """
        unfrozen = [parameter for parameter in trainable if not parameter.requires_grad]
        for parameter in unfrozen:
            parameter.requires_grad_(True)
        try:
            cut = _find_cut(self.trace)
        finally:
            for parameter in unfrozen:
                parameter.requires_grad_(False)
        if any(set(self.trace.values.writers.get(name, ())) & (cut.live - self.cut.live) for name in cut.crossing):
            raise NotCacheableError("a layer that is frozen now overwrites a value at the cut")
        return cut


@attrs.frozen(eq=False)
class Trace:
    """A traced module.

    Args:
        graph: Its operations.
        root: The module that names in the graph refer to.
        values: What each node computes for an example.
    """

    graph: fx.Graph
    root: fx.GraphModule
    values: ValuePropagation

    def extract_backbone(self, crossing: Iterable[str], live: frozenset[str]) -> fx.GraphModule:
        """Return the part that computes the values of some nodes; `live` are those that the tail runs."""
        by_name = {node.name: node for node in self.graph.nodes}
        outputs = [by_name[name] for name in crossing]
        needed = self._find_ancestors(outputs, stop=set(), excluded=live)
        subgraph = fx.Graph()
        seen: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder" or node in needed:
                seen[node] = subgraph.node_copy(node, seen.__getitem__)
        subgraph.output(tuple(seen[node] for node in outputs))
        return fx.GraphModule(self.root, subgraph)

    def extract_tail(self, cut: Cut) -> fx.GraphModule:
        """Return the part that computes the output from the values at a cut.

        Raises:
            NotCacheableError: It would need the inputs as well, or this trace has no such nodes.
        """
        by_name = {node.name: node for node in self.graph.nodes}
        if not set(cut.crossing) <= set(by_name):
            raise NotCacheableError("the model runs other operations in eval mode")
        crossing = [by_name[name] for name in cut.crossing]
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        stop = {*crossing, *filter(_is_batch_size, self.graph.nodes)}
        frozen = frozenset(set(by_name) - cut.live)
        needed = self._find_ancestors([output], stop=stop, excluded=frozen)
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

    def _find_ancestors(self, targets: list[fx.Node], *, stop: set[fx.Node], excluded: frozenset[str]) -> set[fx.Node]:
        """Return all nodes that the targets are computed from, without looking beyond `stop`.

        A node that overwrites the value of another belongs to it, even if nobody uses its own value.
        """
        by_name = {node.name: node for node in self.graph.nodes}
        found: set[fx.Node] = set()
        waiting = list(targets)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [] if node in stop else node.all_input_nodes
                writers = set(self.values.writers.get(node.name, ())) - excluded
                waiting += [by_name[name] for name in sorted(writers) if name in by_name]
        return found


def split_model(
    module: nn.Module,
    example: Any,
    modes: Modes,
    *,
    tracer: Callable[[nn.Module, Any], fx.GraphModule],
    before: StateCopy,
) -> SplitModel:
    """Split a model in the modes of a phase, and once more in eval mode at the same cut.

    Args:
        module: Frozen as the phase asks.
        example: Prepared inputs of two samples.
        modes: The modes of the phase.
        tracer: `trace_with_fx` or `trace_with_export`.
        before: Restores what tracing changes in the module.

    Raises:
        NotCacheableError: There is nothing to cache.
        UntraceableError: The model cannot be traced this way.
    """
    set_modes(modes)
    root = _trace(module, example, tracer)
    before.restore()
    set_modes(modes)
    trace = Trace(root.graph, root, ValuePropagation(root, clone_inputs(example)))
    cut = _find_cut(trace)
    backbone, train_tail = trace.extract_backbone(cut.crossing, cut.live), trace.extract_tail(cut)
    before.restore()
    module.eval()
    root = _trace(module, example, tracer)
    before.restore()
    return SplitModel(backbone, train_tail, Trace(root.graph, root, trace.values).extract_tail(cut), trace, cut)


def trace_with_fx(module: nn.Module, example: Any) -> fx.GraphModule:
    """Trace the module's Python code with symbolic inputs."""
    del example
    return fx.GraphModule(module, fx.Tracer().trace(module))


def trace_with_export(module: nn.Module, example: Any) -> fx.GraphModule:
    """Trace the operations on an example, for any batch size; the graph uses the module's own parameters."""
    free = {0: torch.export.Dim.AUTO}
    given = dict(example) if isinstance(example, Mapping) else {}
    inputs = () if given else (example,)
    shapes: Any = dict.fromkeys(given, free) if given else (free,)
    with silence_tracing():
        root = torch.export.export(module, inputs, given, dynamic_shapes=shapes, strict=False).module()
    assert isinstance(root, fx.GraphModule)
    return root


def _trace(module: nn.Module, example: Any, tracer: Callable[[nn.Module, Any], fx.GraphModule]) -> fx.GraphModule:
    before = rng_states()
    try:
        root = tracer(module, clone_inputs(example))
    except Exception as error:  # noqa: BLE001 - with symbolic inputs the model's code may raise anything
        raise UntraceableError(f"the model cannot be traced ({type(error).__name__})") from None
    if not same_rng_states(rng_states(), before):  # a number drawn while tracing would become a constant
        raise NotCacheableError("the model draws random numbers, which a trace would turn into constants")
    return root


def _find_cut(trace: Trace) -> Cut:
    """Return the nodes whose values cross from the backbone to the live nodes."""
    graph = trace.graph
    input_dependents = _find_input_dependents(graph)
    forced: set[fx.Node] = set()
    while True:
        live = _find_live_nodes(trace, forced)
        crossing = [node for node in graph.nodes if _crosses_cut(node, live, input_dependents)]
        unbatched = {node for node in crossing if node.name not in trace.values.num_bytes}
        # Such as a shape: the tail computes it again. So it does with views of what it overwrites.
        more = unbatched | _find_overwritten_views(trace, live)
        if more <= live:
            break
        forced |= more
    if not crossing or all(node.op == "placeholder" for node in crossing):
        raise NotCacheableError("no frozen layer lies before the first one that trains")
    return Cut(tuple(node.name for node in crossing), frozenset(node.name for node in live))


def _crosses_cut(node: fx.Node, live: set[fx.Node], input_dependents: set[fx.Node]) -> bool:
    return node not in live and node in input_dependents and any(user in live for user in node.users)


def _find_live_nodes(trace: Trace, forced: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that training changes, and all that depend on them. The output is always live."""
    live: set[fx.Node] = set()
    by_name = {node.name: node for node in trace.graph.nodes}
    order = {node: index for index, node in enumerate(trace.graph.nodes)}
    written: dict[fx.Node, list[fx.Node]] = {}
    for name, writers in trace.values.writers.items():
        for writer in writers:
            written.setdefault(by_name[writer], []).append(by_name[name])
    for node in trace.graph.nodes:
        readers = {user for each in written.get(node, ()) for user in each.users if user is not node}
        if (
            node.op == "output"
            or node in live | forced
            or node.name in trace.values.random
            or _is_trainable_or_random(node, trace.root)
            or any(each in live for each in node.all_input_nodes)
            or any(each in live and order[each] < order[node] for each in readers)  # it took the value before
        ):
            live.add(node)
            live |= {each for each in readers if order[each] > order[node]}  # they see the new value
    return live


def _find_overwritten_views(trace: Trace, live: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values share memory with an earlier node that a live node overwrites."""
    found = set()
    for node in trace.graph.nodes:
        base = trace.values.bases.get(node.name, node.name)
        if base != node.name and any(writer.name in trace.values.writers.get(base, ()) for writer in live):
            found.add(node)
    return found


def _is_trainable_or_random(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "get_attr":
        found: Any = operator.attrgetter(str(node.target))(module)
        return isinstance(found, nn.Parameter) and found.requires_grad
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return any(each.training for each in child.modules()) or any(each.requires_grad for each in child.parameters())
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
