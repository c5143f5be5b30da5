"""What each node of a traced model computes for an example: its value, what it overwrites, and whether it is random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from tuneforge.engine.model.inspection import rng_states, same_rng_states


class ValuePropagation(fx.Interpreter):
    """The values of a graph for an example, computed once without gradients.

    Args:
        root: The traced module.
        example: Prepared inputs of two samples, which may be overwritten.

    Attributes:
        writers: For each node the later ones that overwrite its value in place, itself or the memory that it shares.
        bases: For each node that shares memory with an earlier one, the first of them.
        random: Nodes that draw random numbers.
        macs: Multiply-accumulates of each node for one sample.
        num_bytes: Size of the tensors of one sample, for nodes whose value has an axis of samples.
    """

    def __init__(self, root: fx.GraphModule, example: Any) -> None:
        super().__init__(root, garbage_collect_values=False)
        self.writers: dict[str, list[str]] = {}
        self.bases: dict[str, str] = {}
        self.random: set[str] = set()
        self.macs: dict[str, float] = {}
        self._sharing: dict[int, list[str]] = {}
        inputs = [node for node in root.graph.nodes if node.op == "placeholder"]
        by_name = isinstance(example, dict)
        given = {node: example[node.target] for node in inputs if by_name and node.target in example}
        with torch.no_grad(), FlopCounterMode(display=False) as self._flops:
            self.run(*([] if given else [example]), initial_env=given or None)
        self.num_bytes = {
            node.name: value[0].numel() * value.element_size()
            for node, value in self.env.items()
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 2
        }
        self.env.clear()

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node, and note what it overwrites and draws."""
        inputs = [each for node in n.all_input_nodes for each in _tensors_in(self.env[node])]
        versions, generators, flops = [each._version for each in inputs], rng_states(), self._flops.get_total_flops()
        value = super().run_node(n)
        self.macs[n.name] = (self._flops.get_total_flops() - flops) / 4  # two samples, and two operations each
        if not same_rng_states(generators, rng_states()):
            self.random.add(n.name)
        for tensor, version in zip(inputs, versions, strict=True):
            if tensor._version != version:
                for name in self._sharing.get(_memory(tensor), ()):
                    writers = self.writers.setdefault(name, [])
                    writers += [n.name] if n.name not in writers else []
        for tensor in _tensors_in(value):
            sharing = self._sharing.setdefault(_memory(tensor), [])
            if sharing:
                self.bases.setdefault(n.name, sharing[0])
                # Later readers of a view of overwritten memory see what was written before the view was made.
                self.writers.setdefault(n.name, []).extend(
                    each for each in self.writers.get(sharing[0], ()) if each not in (n.name, *self.writers[n.name])
                )
            if n.name not in sharing:
                sharing.append(n.name)
        return value


def _memory(tensor: Tensor) -> int:
    has_storage = tensor.layout == torch.strided and tensor.numel()
    return tensor.untyped_storage().data_ptr() if has_storage else id(tensor)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors_in(each)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
