"""A model with its layer groups and its head, and how it is called and read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.errors import PluginError
from tuneforge.plugin.results import LayerGroupInfo

NORMS = (
    nn.modules.batchnorm._NormBase,  # the only common base of batch and instance norms
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def _names(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


@attrs.frozen
class LayerGroup:
    """A layer group: modules that freeze and thaw together.

    Args:
        name: As selectors write it.
        prefixes: Paths of modules or parameters, such as `"layer1"` or `"features.0"`.
    """

    name: str
    prefixes: tuple[str, ...] = attrs.field(converter=_names)

    def contains(self, parameter: str) -> bool:
        """True where the parameter of that name lies under one of the prefixes."""
        return any(parameter == prefix or parameter.startswith(prefix + ".") for prefix in self.prefixes)


def _groups(values: Iterable[LayerGroup]) -> tuple[LayerGroup, ...]:
    return tuple(values)


@attrs.frozen(eq=False)
class Model:
    """What `model_adapt` passes along its chain.

    Args:
        module: The network. It takes ready inputs: one tensor, or a mapping's tensors by keyword.
        groups: Layer groups from the input to the answer; together they hold every parameter once. The last is the
            head.
        head: Path of the module that gives the answer, such as `"fc"`; a linear layer or a 1x1 convolution.
        labels: Names of the outputs as the weights know them; empty where they have none.
        pretrained_labels: Those of `labels` whose head rows came with the weights; the others start fresh.
        changes: What each adapter changed, a sentence each; printed and stored.
        user_frozen: Parameters that never train, whatever a selector says.
        pretrained: False where every weight is fresh, so that there is nothing to keep by freezing.

    Raises:
        PluginError: A parameter lies in no group, or in two; two groups have one name; there is no module at `head`.
    """

    module: nn.Module
    groups: tuple[LayerGroup, ...] = attrs.field(converter=_groups)
    head: str
    labels: tuple[str, ...] = attrs.field(default=(), converter=_names)
    pretrained_labels: tuple[str, ...] = attrs.field(default=(), converter=_names)
    changes: tuple[str, ...] = attrs.field(default=(), converter=_names)
    user_frozen: tuple[str, ...] = attrs.field(default=(), converter=_names)
    pretrained: bool = True

    def __attrs_post_init__(self) -> None:
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
                    why="together the groups must hold every parameter exactly once",
                    fix="give the module's path to one group",
                )
        self.head_module()

    @classmethod
    def from_module(cls, module: nn.Module, *, head: str | None = None, labels: Iterable[str] = ()) -> Model:
        """A model from any module: groups are found from its structure.

        Args:
            module: The network.
            head: Path of the answering layer; by default the last linear layer in order of registration.
            labels: Names of the outputs; their rows of the head are taken as trained.

        Raises:
            PluginError: It has no linear layer, and `head` was not given.
        """
        head = head or _find_last_linear(module)
        names = tuple(labels)
        return cls(module, groups=infer_layer_groups(module, head), head=head, labels=names, pretrained_labels=names)

    def head_module(self) -> nn.Module:
        """The module that gives the answer."""
        try:
            return self.module.get_submodule(self.head)
        except AttributeError:
            raise PluginError(f"the model has no module '{self.head}'", why="it was named as the head") from None

    def with_head(self, module: nn.Module, **fields: Any) -> Model:
        """The same model with another module at its head (the network is changed in place)."""
        parent, _, name = self.head.rpartition(".")
        setattr(self.module.get_submodule(parent), name, module)
        return attrs.evolve(self, **fields)

    def with_change(self, sentence: str, **fields: Any) -> Model:
        """The same model with one more sentence on what an adapter did."""
        return attrs.evolve(self, changes=(*self.changes, sentence), **fields)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name; a tied one once, under its first name."""
        return dict(self.module.named_parameters())

    def group_infos(self) -> tuple[LayerGroupInfo, ...]:
        """The groups as strategies see them."""
        named = self.parameters()
        members = {group.name: [name for name in named if group.contains(name)] for group in self.groups}
        return tuple(
            LayerGroupInfo(
                name=name, num_parameters=sum(named[each].numel() for each in names), parameter_names=tuple(names)
            )
            for name, names in members.items()
        )

    def depth_of(self, parameter: str) -> int:
        """Groups between a parameter's and the answer: 0 for the head."""
        index = next(index for index, group in enumerate(self.groups) if group.contains(parameter))
        return len(self.groups) - 1 - index


def call_module(module: nn.Module, inputs: Any) -> Any:
    """The module's output for ready inputs: a mapping goes in by keyword."""
    plain = isinstance(inputs, Tensor) or not isinstance(inputs, Mapping)  # the first is the quicker question
    return module(inputs) if plain else module(**inputs)


def extract_logits(output: Any) -> Any:
    """The tensor that answers, where a module returns more: its `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is not None:
        return logits
    return output[0] if isinstance(output, (tuple, list)) else output


def accepts_inputs(model: Model, example: Any) -> bool:
    """True where the module takes ready inputs without an error; only a buffer that its forward pass writes moves."""
    try:
        _try_forward(model, example)
    except Exception:  # noqa: BLE001 - whatever a module raises, the answer is no; `check_output` shows it
        return False
    return True


def check_output(model: Model, example: Any) -> None:
    """See that the module takes the data and that its head gives the answer.

    Raises:
        PluginError: It does not; the message says which.
    """
    name = type(model.module).__name__
    try:
        output, heads = _try_forward(model, example)
    except Exception as error:
        raise PluginError(
            f"{name} cannot take the data",
            where=f"inputs {format_shapes(example)}",
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="choose a model, adapters or data options that fit one another",
        ) from error
    if not isinstance(output, Tensor):
        raise PluginError(
            f"{name} answers with {type(output).__name__}",
            why="a tensor, a tuple that begins with one, or something with `logits` is expected",
            fix="return the answer as a tensor",
        )
    if not any(head.shape[-1] == output.shape[-1] or head.shape[1:2] == output.shape[1:2] for head in heads):
        raise PluginError(
            f"the head '{model.head}' does not give the answer of {name}",
            why="it gives " + (", ".join(str(tuple(head.shape)) for head in heads) or "nothing, it is not called"),
            fix="name the module that answers: Model.from_module(module, head='path.of.it')",
        )


def format_shapes(inputs: Any) -> str:
    """Shapes of a batch of inputs, by name where there are several."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
    return str(tuple(inputs.shape)) if isinstance(inputs, Tensor) else type(inputs).__name__


def _try_forward(model: Model, example: Any) -> tuple[Any, list[Tensor]]:
    """The answer for the example and what the head gave on the way, in eval mode, without a trace."""
    heads: list[Tensor] = []
    handle = model.head_module().register_forward_hook(lambda module, args, output: heads.append(output))
    before = [(module, module.training) for module in model.module.modules()]
    try:
        model.module.eval()
        with torch.no_grad():
            return extract_logits(call_module(model.module, example)), [
                head for head in heads if isinstance(head, Tensor)
            ]
    finally:
        for module, training in before:
            module.training = training
        handle.remove()


def infer_layer_groups(module: nn.Module, head: str) -> tuple[LayerGroup, ...]:
    """Layer groups of any module, from its structure.

    The children are the groups. A sequence that holds more than half of all parameters is opened into its members, as
    is whatever contains the head; a norm stays with the layer before it. What lies under `head` is the last group.
    """
    found = [group for group in _expand_groups(module, "", head, _count_parameters(module)) if group.name != head]
    below = [LayerGroup("not-the-head" if group.name == "head" else group.name, group.prefixes) for group in found]
    return (*below, LayerGroup("head", (head,)))


def _expand_groups(module: nn.Module, path: str, head: str, total: int) -> list[LayerGroup]:
    """Groups below `path`, opened where one is too large or contains the head."""
    own = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    groups = [LayerGroup(name, (name,)) for name in own]
    for name, child in module.named_children():
        below = f"{path}.{name}".lstrip(".")
        if _count_parameters(child) == 0:
            continue
        if isinstance(child, NORMS) and groups and head not in (below, groups[-1].name):
            groups[-1] = LayerGroup(groups[-1].name, (*groups[-1].prefixes, below))
            continue
        large = _count_parameters(child) > total / 2 and isinstance(child, (nn.Sequential, nn.ModuleList))
        inside = _expand_groups(child, below, head, total) if large or head.startswith(below + ".") else []
        groups += inside if len(inside) > 1 or head.startswith(below + ".") else [LayerGroup(below, (below,))]
    return groups


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _find_last_linear(module: nn.Module) -> str:
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and name]
    if not linear:
        raise PluginError(
            f"no linear layer in {type(module).__name__}",
            why="the last linear layer is taken for the head",
            fix="name the head: Model.from_module(module, head='path.of.it')",
        )
    return str(linear[-1])
