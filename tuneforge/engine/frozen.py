"""The frozen prefix: whatever depends only on the input and on frozen parameters is computed once a phase, and kept.

The split is by dataflow: `torch.fx` traces the model in the phase's own modes, and every node is *live* that reaches a
trained parameter, a random operation or a module in training mode. The rest is the prefix; the values that cross the
border are what is kept. Before anything is trusted, prefix and suffix composed are compared with the model to the bit.
"""

from __future__ import annotations

import contextlib
import operator
import random
from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tuneforge.engine.data import Split, map_inputs, tensors_of
from tuneforge.engine.freezing import put_back, set_modes
from tuneforge.engine.model import answer_of, call
from tuneforge.engine.proof import same_bits
from tuneforge.engine.run import Features, Run
from tuneforge.plugin.steps import Phase

LEAST_WORK = 16.0
"""Operations of the prefix for each byte kept, under which recomputing is no dearer than fetching."""

_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "multinomial", "normal", "poisson"}


class NoPrefixError(Exception):
    """There is no prefix worth keeping; the message completes `not cached: ...`."""


@attrs.frozen(eq=False)
class Prefix:
    """A model in two parts, for one phase.

    Args:
        head: Ready inputs to the values at the border, each (b, ...).
        training: The values to the answer, while the phase trains.
        evaluating: The same in eval mode.
        bytes_each: Size of the values of one sample.
        kept: The values of a split's samples, by the split's identity.
    """

    head: nn.Module
    training: nn.Module
    evaluating: nn.Module
    bytes_each: int
    kept: dict[int, tuple[Tensor, ...]] = attrs.field(factory=dict)

    def values(self, split: Split, rows: Tensor) -> Features | None:
        """The values of some samples, or None where the split is not kept."""
        kept = self.kept.get(id(split))
        return None if kept is None else Features(tuple(each.index_select(0, rows.to(each.device)) for each in kept))


def prefix_of(run: Run, phase: Phase, plan: list[tuple[nn.Module, bool]]) -> Prefix:
    """Split the model for a phase, and fill what is kept from the training and the validation split.

    Args:
        run: With the model frozen as the phase asks.
        phase: What will train.
        plan: The modes of the phase.

    Raises:
        NoPrefixError: There is none, or it would not pay; nothing is changed.
    """
    _refuse_without_looking(run, phase)
    module, example = run.model.module, run.example
    with _untouched(module):
        try:
            set_modes(plan)
            graph = _traced(module)
            border = _border(graph, module, example)
            head, training = _cut(graph, module, border)
            module.eval()
            evaluating = _cut(_traced(module), module, border)[1]
            prefix = Prefix(head, training, evaluating, _check(run, head, training, evaluating, plan))
        except NoPrefixError:
            raise
        except Exception as error:  # noqa: BLE001 - it runs the model's own code in parts, which may raise anything
            raise NoPrefixError(f"the model cannot be run in parts ({type(error).__name__})") from None
        for split in (run.data.train, run.data.val):
            prefix.kept[id(split)] = _filled(run, prefix.head, split)
    return prefix


def _refuse_without_looking(run: Run, phase: Phase) -> None:
    if run.config.cache == "off":
        raise NoPrefixError("--cache off")
    if run.augments:
        raise NoPrefixError("random augmentation changes the inputs in every epoch")
    for member in run.hooks.members:
        if getattr(member.component, "needs_inputs", False):
            raise NoPrefixError(f"{member.label} needs the inputs themselves")
    if phase.epochs == 1:
        raise NoPrefixError("each sample is looked at once anyway")
    if any(each._forward_hooks or each._forward_pre_hooks for each in run.model.module.modules()):
        raise NoPrefixError("the model has forward hooks, which a traced part would not call")


def _traced(module: nn.Module) -> fx.Graph:
    before = _generators()
    try:
        graph = fx.Tracer().trace(module)
        if _generators() != before:  # what was drawn while tracing would be the same number for ever
            raise NoPrefixError("the model draws random numbers that a trace would freeze")
        return graph
    except NoPrefixError:
        raise
    except Exception as error:  # noqa: BLE001 - tracing runs the model's own code on stand-ins, which may raise anything
        raise NoPrefixError(f"the model cannot be traced ({type(error).__name__})") from None


def _generators() -> tuple[Any, ...]:
    state: Any = np.random.get_state(legacy=True)
    return random.getstate(), state[1].tobytes(), state[2], torch.get_rng_state().numpy().tobytes()


def _border(graph: fx.Graph, module: nn.Module, example: Any) -> list[str]:
    """Names of the nodes whose values cross from the prefix to what lives."""
    live = _live(graph, module)
    given = _dependent(graph)
    values = _Values(module, graph).of(example)
    while True:
        border = [node for node in graph.nodes if _crosses(node, live, given)]
        loose = [node for node in border if not _kept_by_sample(values.get(node.name))]
        if not loose:
            break
        live |= set(loose)  # a shape, say: computed again from what it is the shape of
    names = [node.name for node in border]
    if not names or all(node.op == "placeholder" for node in border):
        raise NoPrefixError("nothing frozen lies before what trains")
    return names


def _crosses(node: fx.Node, live: set[fx.Node], given: set[fx.Node]) -> bool:
    return node not in live and node in given and any(user in live for user in node.users)


def _kept_by_sample(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 2


def _live(graph: fx.Graph, module: nn.Module) -> set[fx.Node]:
    """Nodes that training changes, and all that depends on them; the answer is always one."""
    live: set[fx.Node] = set()
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "output" or _changes(node, module) or any(each in live for each in node.all_input_nodes):
            live.add(node)
            for written in _written(node, module):  # whoever reads it afterwards reads what was written
                live |= {user for user in written.users if order[user] > order[node]}
    return live


def _changes(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "get_attr":
        found: Any = operator.attrgetter(str(node.target))(module)
        return isinstance(found, nn.Parameter) and found.requires_grad
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        return child.training or any(parameter.requires_grad for parameter in child.parameters())
    if node.op not in ("call_function", "call_method"):
        return False
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    if name in _RANDOM or node.kwargs.get("training") is True or node.kwargs.get("dropout_p") not in (None, 0, 0.0):
        return True
    return ("dropout" in name or name in ("stochastic_depth", "batch_norm")) and True in node.args


def _written(node: fx.Node, module: nn.Module) -> list[fx.Node]:
    """Nodes whose value this one overwrites in place."""
    target = getattr(node.target, "__name__", str(node.target))
    inplace = node.kwargs.get("inplace") is True
    if node.op == "call_module":
        inplace = bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method" or node.op == "call_function":
        inplace = inplace or (target.endswith("_") and not target.endswith("__")) or node.target in _IN_PLACE
    return node.all_input_nodes[:1] if inplace else []


_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


def _dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the input."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _cut(graph: fx.Graph, module: nn.Module, border: list[str]) -> tuple[nn.Module, nn.Module]:
    """The part before the border, and the part after it."""
    by_name = {node.name: node for node in graph.nodes}
    if not set(border) <= set(by_name):
        raise NoPrefixError("the model takes another way in evaluation")
    crossing = [by_name[name] for name in border]
    (answer,) = (node for node in graph.nodes if node.op == "output")
    needed_before, needed_after = _sources(crossing, stop=set()), _sources([answer], stop=set(crossing))
    before, after = fx.Graph(), fx.Graph()
    seen: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or node in needed_before:
            seen[node] = before.node_copy(node, seen.__getitem__)
    before.output(tuple(seen[node] for node in crossing))
    placed = {node: after.placeholder(f"value_{place}") for place, node in enumerate(crossing)}
    for node in graph.nodes:
        if node in needed_after and node not in placed and node is not answer:
            if node.op == "placeholder":
                raise NoPrefixError("what trains takes the input itself")
            placed[node] = after.node_copy(node, placed.__getitem__)
    after.output(fx.map_arg(answer.args[0], placed.__getitem__))
    return fx.GraphModule(module, before), fx.GraphModule(module, after)


def _sources(targets: list[fx.Node], *, stop: set[fx.Node]) -> set[fx.Node]:
    """What the targets are computed from, not looking beyond `stop`."""
    found: set[fx.Node] = set()
    waiting = list(targets)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in stop else node.all_input_nodes
    return found


class _Values(fx.Interpreter):
    """The value of every node for an example."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)

    def of(self, example: Any) -> dict[str, Any]:
        """Values by the node's name, computed without a trace in the model's state."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = (
            {node: example[node.target] for node in inputs if node.target in example}
            if isinstance(example, dict)
            else {}
        )
        with torch.no_grad():
            self.run(*([] if given else [example]), initial_env=given or None)
        return {node.name: value for node, value in self.env.items()}


def _check(
    run: Run, head: nn.Module, training: nn.Module, evaluating: nn.Module, plan: list[tuple[nn.Module, bool]]
) -> int:
    """See that the parts agree with the whole to the bit, keep samples apart, pay, and fit. Returns bytes a sample."""
    module, example = run.model.module, run.example
    with torch.no_grad(), run.autocast():
        for part, modes in ((training, plan), (evaluating, [(child, False) for child in module.modules()])):
            set_modes(modes)
            run.reseed()
            whole = answer_of(call(module, example))
            run.reseed()
            if not same_bits(whole, answer_of(part(*call(head, example)))):
                raise NoPrefixError("the parts of the model do not give what the whole gives")
        values = call(head, example)
        for place in (0, 1):  # a sample's values must not depend on its neighbour
            alike = call(head, _twice(example, place))
            pairs = zip(values, alike, strict=True)
            if not all(torch.allclose(one[place], other[place], equal_nan=True) for one, other in pairs):
                raise NoPrefixError("the frozen part mixes samples")
        with FlopCounterMode(display=False) as counter:
            call(head, example)
    bytes_each: int = sum(value[0].numel() * value.element_size() for value in values)
    if counter.get_total_flops() / 2 < LEAST_WORK * bytes_each:
        raise NoPrefixError("the frozen part is so cheap that computing it again costs no more")
    total = bytes_each * (len(run.data.train) + len(run.data.val))
    if total > run.config.cache_mb * 2**20:
        raise NoPrefixError(f"its values take {total / 2**20:,.0f} MB, more than --cache-mb {run.config.cache_mb}")
    return bytes_each


def _twice(example: Any, place: int) -> Any:
    return map_inputs(example, lambda tensor: tensor[[place, place]])


def _filled(run: Run, head: nn.Module, split: Split) -> tuple[Tensor, ...]:
    """The values of all samples of a split, computed in one fixed geometry, because bits differ with the batch size."""
    size = _fill_batch(run.example)
    kept: list[Tensor] = []
    run.model.module.eval()
    with torch.no_grad(), run.autocast():
        for start in range(0, len(split), size):
            rows = torch.arange(start, start + size).clamp_max(len(split) - 1)  # the tail is padded with the last one
            stored = map_inputs(split.fetch(rows), run.device.move)
            values = call(head, run.place(run.data.inputs.ready(stored)))
            if not kept:
                kept = [
                    torch.empty(len(split), *value.shape[1:], dtype=value.dtype, device=value.device)
                    for value in values
                ]
            stop = min(start + size, len(split))
            for store, value in zip(kept, values, strict=True):
                store[start:stop] = value[: stop - start]
    return tuple(kept)


def _fill_batch(example: Any) -> int:
    """Samples of one pass: the fastest from 16 to 64 measured so, by the size of a sample."""
    numbers = sum(tensor[0].numel() for tensor in tensors_of(example).values())
    return max(16, min(64, 1 << (2**21 // max(1, numbers)).bit_length() >> 1))


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Put modes and buffers back: looking at a model in training mode moves the statistics of its norms."""
    before = [(child, child.training) for child in module.modules()]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        set_modes(before)
        put_back(module, buffers)
