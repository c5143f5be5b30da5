"""Which layer computes the output of a module: found in the graph of autograd, not by the order of registration."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.model import Model, call_module, extract_logits, infer_layer_groups
from tuneforge.errors import PluginError


def infer_head(model: Model, example: Any) -> Model:
    """Return the model with the head that computes its output, in training and in eval mode.

    Args:
        model: A model whose head was not named.
        example: Prepared inputs. Where the module does not accept them, the head stays as it is.

    Raises:
        PluginError: Several layers compute the output, or a weight that is no layer's; the message names them.
    """
    found = find_output_layers(model.module, example)
    if not found or found == [model.head]:
        return attrs.evolve(model, head_inferred=False)
    paths = dict(model.module.named_modules())
    if len(found) == 1 and found[0] in paths:
        groups = infer_layer_groups(model.module, found[0])
        return attrs.evolve(model, head=found[0], groups=groups, head_inferred=False)
    raise PluginError(
        f"the head of {type(model.module).__name__} is not one layer: {', '.join(found)}",
        where="the layers and weights that compute its output, in training or in eval mode",
        why="phases train 'head' by itself, and its size must be the number of classes",
        fix="let a single linear layer compute the output: keep one of several heads; add one to a network that has "
        "none, nn.Sequential(network, nn.Linear(num_features, num_classes)); or name the layer that is trained as the "
        "head: Model.from_module(module, head='path.of.it')",
    )


def wrong_head_error(model: Model) -> PluginError:
    """Return the error for a component that built a model without naming its head."""
    return PluginError(
        f"the head '{model.head}' does not compute the output of {type(model.module).__name__}",
        why="nobody named the head, and the last linear layer is not the one",
        fix="name it: Model.from_module(module, head='path.of.it')",
    )


def find_output_layers(module: nn.Module, example: Any) -> list[str]:
    """Return the paths of the layers that compute the output with no other layer behind them.

    A weight that is used without a linear layer or a 1x1 convolution is returned by its own name. The list is empty if
    the module does not accept the example.
    """
    found: dict[str, None] = {}
    for training in (False, True):
        # In training a module may need more than inputs, such as targets.
        with contextlib.suppress(Exception), preserve_state(module), torch.enable_grad():
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            module.train(training)
            found |= dict.fromkeys(_Trace(module).run(_match_device(module, example)))
    return list(found)


class _Trace:
    """The outputs of each possible head in one forward pass, by their node in the graph of autograd."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._nodes: dict[Any, tuple[str, torch.Size]] = {}

    def run(self, example: Any) -> list[str]:
        """Return the paths of the layers, and the names of weights, that are nearest to the output."""
        layers = {child: path for path, child in self._module.named_modules() if path and _can_be_head(child)}
        handles = [child.register_forward_hook(self._record(path)) for child, path in layers.items()]
        try:
            output = extract_logits(call_module(self._module, example))
        finally:
            for handle in handles:
                handle.remove()
        return self._nearest(output) if isinstance(output, Tensor) else []

    def _record(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                self._nodes[output.grad_fn] = (path, output.shape)

        return hook

    def _nearest(self, output: Tensor) -> list[str]:
        names = {id(each): name for name, each in self._module.named_parameters()}
        layers: dict[str, bool] = {}
        weights: dict[str, None] = {}
        seen, waiting = set(), [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._nodes:
                path, shape = self._nodes[node]
                layers[path] = layers.get(path, False) or _same_width(shape, output.shape)
                continue
            parameter = getattr(node, "variable", None)
            if isinstance(parameter, nn.Parameter) and _is_matrix_for(parameter, output.shape):
                weights[names[id(parameter)]] = None
            waiting += [following for following, _ in node.next_functions]
        wide = [path for path, is_wide in layers.items() if is_wide]
        order = {path: number for number, (path, _) in enumerate(self._module.named_modules())}
        return sorted(wide or ([] if weights else layers), key=order.__getitem__) + list(weights)


def _can_be_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def _same_width(one: torch.Size, other: torch.Size) -> bool:
    return one[-1:] == other[-1:] or one[1:2] == other[1:2]


def _is_matrix_for(parameter: Tensor, output: torch.Size) -> bool:
    """Return True for a weight with as many rows or columns as the output is wide; scales and biases are none."""
    sizes = [size for size in parameter.shape if size > 1]
    return len(sizes) > 1 and bool({*parameter.shape} & {*output[1:]})


def _match_device(module: nn.Module, example: Any) -> Any:
    """Return the example on the module's device, its floating-point tensors in the module's dtype."""
    first = next((each for each in module.parameters() if each.is_floating_point()), None)

    def match(value: Any) -> Any:
        if not isinstance(value, Tensor) or first is None:
            return value
        return value.to(first.device, first.dtype if value.is_floating_point() else value.dtype)

    return {name: match(each) for name, each in example.items()} if isinstance(example, Mapping) else match(example)
