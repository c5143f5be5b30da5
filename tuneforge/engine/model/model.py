"""A model with its layer groups and its head, and how it is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.module_check import check_module
from tuneforge.errors import PluginError
from tuneforge.plugin.results import LayerGroupInfo

NORMS = (
    nn.modules.batchnorm._NormBase,  # the only common base class of batch and instance norms
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
_USUAL_IMAGE_SIZES = (8, 16, 28, 32, 48, 64, 96, 112, 128, 160, 192, 224, 240, 256, 288, 299, 320, 336, 384, 448, 512)


def _names(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen
class LayerGroup:
    """A layer group: modules that are frozen and unfrozen together.

    Args:
        name: As selectors write it.
        prefixes: Paths of modules or parameters, such as `"layer1"` or `"features.0"`.
    """

    name: str
    prefixes: tuple[str, ...] = attrs.field(converter=_names)

    def contains(self, parameter: str) -> bool:
        """Return True if the parameter lies under one of the prefixes."""
        return any(parameter == prefix or parameter.startswith(prefix + ".") for prefix in self.prefixes)


def _groups(values: Iterable[LayerGroup]) -> tuple[LayerGroup, ...]:
    return tuple(values)


@attrs.frozen(eq=False)
class Model:
    """A network with its layer groups and its head: what `model_adapt` hooks pass along their chain.

    Args:
        module: The network. It takes prepared inputs: one tensor, or a mapping whose tensors are passed by keyword.
        groups: Layer groups from the input to the output; together they contain every parameter once. The last one is
            the head.
        head: Path of the module that computes the output, such as `"fc"`; a linear layer or a 1x1 convolution.
        labels: Names of the outputs; empty if they have none.
        pretrained_labels: Those of `labels` whose rows of the head are pretrained; the others are randomly initialized.
        changes: What each adapter changed, one sentence each; logged and stored.
        user_frozen: Parameters that the user froze; they never train, whatever a selector matches.
        pretrained: False if all weights are randomly initialized, so that freezing would preserve nothing.
        head_inferred: True if nobody named the head, so that the run looks for it with the data.

    Raises:
        PluginError: A parameter lies in no group, or in two; two groups have one name; there is no module at `head`;
            the module is of a kind that cannot be fine-tuned, such as a scripted one.
    """

    module: nn.Module
    groups: tuple[LayerGroup, ...] = attrs.field(converter=_groups)
    head: str
    labels: tuple[str, ...] = attrs.field(default=(), converter=_names)
    pretrained_labels: tuple[str, ...] = attrs.field(default=(), converter=_names)
    changes: tuple[str, ...] = attrs.field(default=(), converter=_names)
    user_frozen: tuple[str, ...] = attrs.field(default=(), converter=_names)
    pretrained: bool = True
    head_inferred: bool = False

    def __attrs_post_init__(self) -> None:
        check_module(self.module, self.head)
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names) or "head" in names[:-1]:
            raise PluginError(
                f"layer groups are named {', '.join(names)}",
                why="names must differ, and 'head' is the name of the last group only",
                fix="rename the groups",
            )
        for name, _ in self.module.named_parameters():
            holders = [group.name for group in self.groups if group.contains(name)]
            if len(holders) != 1:
                raise PluginError(
                    f"parameter '{name}' lies in {'no layer group' if not holders else ' and '.join(holders)}",
                    where=", ".join(group.name for group in self.groups),
                    why="every parameter must lie in exactly one group",
                    fix="give the module's path to one group",
                )
        self.head_module()

    @classmethod
    def from_module(cls, module: nn.Module, *, head: str | None = None, labels: Iterable[str] = ()) -> Model:
        """A model from any module: groups are found from its structure.

        Args:
            module: The network.
            head: Path of the layer that computes the output. By default a run finds it by dataflow, once it has data;
                until then it is the last linear layer.
            labels: Names of the outputs; their rows of the head are taken as trained.

        Raises:
            PluginError: It has no linear layer, and `head` was not given; or it cannot be fine-tuned.
        """
        check_module(module)
        path = head or _find_last_linear(module)
        names = tuple(labels)
        model = cls(module, groups=infer_layer_groups(module, path), head=path, labels=names, pretrained_labels=names)
        return attrs.evolve(model, head_inferred=head is None)

    def head_module(self) -> nn.Module:
        """Return the module that computes the output."""
        try:
            return self.module.get_submodule(self.head)
        except AttributeError:
            raise PluginError(f"the model has no module '{self.head}'", why="it was named as the head") from None

    def with_head(self, module: nn.Module, **fields: Any) -> Model:
        """Replace the head in the network, in place, and return the model with these fields changed."""
        parent, _, name = self.head.rpartition(".")
        setattr(self.module.get_submodule(parent), name, module)
        return attrs.evolve(self, **fields)

    def with_change(self, sentence: str, **fields: Any) -> Model:
        """Return the same model with one more sentence about what an adapter changed."""
        return attrs.evolve(self, changes=(*self.changes, sentence), **fields)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter by name; a tied one is listed once, under its first name."""
        return dict(self.module.named_parameters())

    def aliases(self) -> dict[str, str]:
        """Return every name of every parameter with its first name; a tied parameter has several names."""
        first = {id(each): name for name, each in self.module.named_parameters()}
        return {name: first[id(each)] for name, each in self.module.named_parameters(remove_duplicate=False)}

    def head_ties(self) -> dict[str, str]:
        """Return the names of head parameters that are tied to one outside the head, each with the other's name."""
        aliases = self.aliases()
        outside = {first: name for name, first in aliases.items() if not name.startswith(f"{self.head}.")}
        return {
            name: outside[first]
            for name, first in aliases.items()
            if name.startswith(f"{self.head}.") and first in outside
        }

    def group_infos(self) -> tuple[LayerGroupInfo, ...]:
        """Return the layer groups as strategies see them."""
        named = self.parameters()
        members = {group.name: [name for name in named if group.contains(name)] for group in self.groups}
        return tuple(
            LayerGroupInfo(
                name=name, num_parameters=sum(named[each].numel() for each in names), parameter_names=tuple(names)
            )
            for name, names in members.items()
        )

    def depth_of(self, parameter: str) -> int:
        """Return the number of layer groups after the one of the parameter: 0 for the head."""
        index = next(index for index, group in enumerate(self.groups) if group.contains(parameter))
        return len(self.groups) - 1 - index


def call_module(module: nn.Module, inputs: Any) -> Any:
    """Return the module's output for prepared inputs; the tensors of a mapping are passed by keyword."""
    plain = isinstance(inputs, Tensor) or not isinstance(inputs, Mapping)  # the first check is the faster one
    return module(inputs) if plain else module(**inputs)


def extract_logits(output: Any) -> Any:
    """Return the logits of an output: a tensor itself, its `logits`, or the first element of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is not None:
        return logits
    return output[0] if isinstance(output, (tuple, list)) else output


def accepts_inputs(model: Model, example: Any) -> bool:
    """Return True if a forward pass with these inputs raises nothing; the model is left as it was."""
    try:
        _try_forward(model, example)
    except Exception:  # noqa: BLE001 - a module may raise anything; `check_output` reports it
        return False
    return True


def check_output(model: Model, example: Any) -> None:
    """Check that the module accepts the data and that its head computes the output.

    Raises:
        PluginError: One of them fails; the message says which.
    """
    name = type(model.module).__name__
    try:
        output, heads = _try_forward(model, example)
    except Exception as error:
        raise PluginError(
            f"{name} does not accept the data",
            where=f"inputs {format_shapes(example)}",
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix=_suggest_image_size(model, example) or "choose a model, adapters and data options that match",
        ) from error
    if not isinstance(output, Tensor):
        raise PluginError(
            f"{name} returns {type(output).__name__}",
            why="it must return a tensor, a tuple that begins with one, or an object with `logits`",
            fix="return the logits as a tensor",
        )
    if not any(head.shape[-1] == output.shape[-1] or head.shape[1:2] == output.shape[1:2] for head in heads):
        raise PluginError(
            f"the head '{model.head}' does not compute the output of {name}",
            why="its output is " + (", ".join(str(tuple(head.shape)) for head in heads) or "missing: it is not called"),
            fix="name the module that computes the logits: Model.from_module(module, head='path.of.it')",
        )


def _suggest_image_size(model: Model, example: Any) -> str | None:
    """Return the smallest usual size of images that the module accepts instead, as a sentence, or None."""
    if not isinstance(example, Tensor) or example.ndim != 4 or not example.is_floating_point():
        return None
    for side in _USUAL_IMAGE_SIZES:
        images = example.new_zeros(*example.shape[:2], side, side)
        if images.shape != example.shape and accepts_inputs(model, images):
            return f"the module accepts images of {side}x{side} pixels: give the data this size (--data.size {side})"
    return None


def format_shapes(inputs: Any) -> str:
    """Return the shapes of a batch of inputs as text, by name if there are several."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
    return str(tuple(inputs.shape)) if isinstance(inputs, Tensor) else type(inputs).__name__


def _try_forward(model: Model, example: Any) -> tuple[Any, list[Tensor]]:
    """Return the output for the example, and the outputs of the head on the way, from a forward pass in eval mode."""
    heads: list[Tensor] = []
    handle = model.head_module().register_forward_hook(lambda module, args, output: heads.append(output))
    try:
        with preserve_state(model.module), torch.no_grad():
            model.module.eval()
            output = extract_logits(call_module(model.module, example))
    finally:
        handle.remove()
    return output, [head for head in heads if isinstance(head, Tensor)]


def infer_layer_groups(module: nn.Module, head: str) -> tuple[LayerGroup, ...]:
    """Return layer groups of any module, inferred from its structure.

    Each child is a group. A sequential container with more than half of all parameters is split into its members, and
    so is what holds it and whatever contains the head. A norm layer belongs to the group before it. Parameters that
    stand alone before the first member of a container, such as the class token and the position embedding of a vision
    transformer, belong to the first layer. Everything below `head` is the last group.
    """
    found = [group for group in _expand_groups(module, "", head, _count_parameters(module)) if group.name != head]
    found = _join_embeddings(module, found)
    below = [LayerGroup("pre-head" if group.name == "head" else group.name, group.prefixes) for group in found]
    return (*below, LayerGroup("head", (head,)))


def _expand_groups(module: nn.Module, path: str, head: str, total: int) -> list[LayerGroup]:
    """Return the groups below `path`, split where one is too large or contains the head."""
    own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    groups = [LayerGroup(name, (name,)) for name in own]
    for name, child in module.named_children():
        below = f"{path}.{name}".lstrip(".")
        if _count_parameters(child) == 0:
            continue
        if isinstance(child, NORMS) and groups and head not in (below, groups[-1].name):
            groups[-1] = LayerGroup(groups[-1].name, (*groups[-1].prefixes, below))
            continue
        large = any(_is_large_container(each, total) for each in (child, *child.children()))
        inside = _expand_groups(child, below, head, total) if large or head.startswith(below + ".") else []
        groups += inside if len(inside) > 1 or head.startswith(below + ".") else [LayerGroup(below, (below,))]
    return groups


def _is_large_container(module: nn.Module, total: int) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList)) and _count_parameters(module) > total / 2


def _join_embeddings(module: nn.Module, groups: list[LayerGroup]) -> list[LayerGroup]:
    """Return the groups, with those of single parameters below the first block in the group of the first layer."""
    containers = {name for name, child in module.named_modules() if isinstance(child, (nn.Sequential, nn.ModuleList))}
    blocks = (i for i, group in enumerate(groups) if group.prefixes[0].rpartition(".")[0] in containers - {""})
    stem = groups[: next(blocks, len(groups))]
    parameters = dict(module.named_parameters())
    single = [group for group in stem if group.name in parameters]
    layers = [group for group in stem if group.name not in parameters]
    if not single:
        return groups
    name, prefixes = (layers[0].name, layers[0].prefixes) if layers else (single[0].name, ())
    joined = LayerGroup(name, (*(group.name for group in single), *prefixes))
    return [joined, *layers[1:], *groups[len(stem) :]]


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _find_last_linear(module: nn.Module) -> str:
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and name]
    if not linear:
        raise PluginError(
            f"no linear layer in {type(module).__name__}",
            why="without a name, the last linear layer is the head",
            fix="add a head to a network that has none: nn.Sequential(network, nn.Linear(num_features, num_classes)); "
            "or name it: Model.from_module(module, head='path.of.it')",
        )
    return str(linear[-1])
