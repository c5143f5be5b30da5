"""Model adapters: changes to a model before the run. Each records what it changed.

Shapes: k outputs, f features, c channels, h and w pixels of a kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from tuneforge import Model, PluginError, between, component, gt, hookimpl, option
from tuneforge.builtin.models.heads import get_head_layer, num_head_outputs, resize_head
from tuneforge.builtin.name_lists import abbreviate_names

if TYPE_CHECKING:
    from tuneforge import Run


@component(api=1)
class Head:
    """Resize the head to the classes of the data; rows of classes that the model has, by name, are kept."""

    keep: bool = option(default=True, help="Keep the rows of classes that the model has, by name.")

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Replace the head, unless its outputs are the classes of the data.

        Raises:
            PluginError: There is no model, or its head is neither a linear layer nor a 1x1 convolution.
        """
        model = _require_model(model, "head")
        head = get_head_layer(model)
        labels, size = run.data.targets.labels, run.data.targets.num_outputs
        if num_head_outputs(head) == size and model.labels in ((), labels):
            known = (
                model.pretrained_labels if model.labels else labels
            )  # whose names are not known is taken at its word
            return attrs.evolve(model, labels=labels, pretrained_labels=known)
        kept = [name for name in labels if self.keep and name in model.labels]
        rows = {labels.index(name): model.labels.index(name) for name in kept}
        module, ties = resize_head(head, size, rows, seed=run.config.seed), model.head_ties()
        changed = model.with_head(module, labels=labels, pretrained_labels=tuple(kept))
        sentence = _describe_resize(num_head_outputs(head), size, kept, labels)
        if ties:
            sentence += f"; no longer tied to {', '.join(sorted(set(ties.values())))}, which keeps its weight"
        return changed.with_change(sentence)


@component(api=1)
class InputChannels:
    """Change the input channels of the first convolution; outputs for grayscale images stay the same."""

    channels: int = option(default=1, help="Number of input channels.", check=gt(0))

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Replace the first convolution, unless it has that number of channels.

        For fewer channels, the weights are summed over channels. For more, each new channel gets the mean of the
        weights, and all are scaled so that their sum is unchanged.

        Raises:
            PluginError: There is no model or no ungrouped convolution, or the model rescales its input channels.
        """
        del run
        model = _require_model(model, "input-channels")
        name, conv = _first_conv(model)
        if conv.in_channels == self.channels:
            return model
        if getattr(model.module, "transform_input", False):
            raise PluginError(
                f"{type(model.module).__name__} with these weights needs three channels",
                why="it rescales red, green and blue (transform_input)",
                fix="remove input-channels and use --data.channels 3",
            )
        old = conv.in_channels
        _set_submodule(
            model.module, name, _replace_conv_weight(conv, _change_weight_channels(conv.weight.detach(), self.channels))
        )
        return model.with_change(f"input: {old} -> {self.channels} channels ('{name}')")


@component(api=1)
class Dropout:
    """Dropout before the head."""

    p: float = option(default=0.5, help="Dropout probability.", check=between(0, 1))

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Insert dropout before the head; the parameters of the head stay in their layer group.

        Raises:
            PluginError: There is no model.
        """
        del run
        model = _require_model(model, "dropout")
        changed = model.with_head(nn.Sequential(nn.Dropout(self.p), model.head_module()))
        sentence = f"dropout: {self.p:g} of the features before '{model.head}'"
        return changed.with_change(sentence, head=f"{model.head}.1")


def _require_model(model: Model | None, name: str) -> Model:
    if model is None:
        raise PluginError(f"adapter '{name}' got no model", where="--model", fix=f"name a model before --adapt {name}")
    return model


def _describe_resize(old: int, new: int, kept: Sequence[str], labels: Sequence[str]) -> str:
    new_names = [name for name in labels if name not in set(kept)]
    sentence = f"head: {old} -> {new} outputs"
    if not kept:
        return f"{sentence}, all randomly initialized"
    return f"{sentence}, kept the rows of {abbreviate_names(kept)}" + (
        f"; randomly initialized: {abbreviate_names(new_names)}" if new_names else ""
    )


def _first_conv(model: Model) -> tuple[str, nn.Conv2d]:
    """Return the first convolution by order of registration, which takes the image in all models of torchvision."""
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return name, module
    raise PluginError(
        f"{type(model.module).__name__} has no convolution", where="--adapt input-channels", fix="remove the adapter"
    )


def _change_weight_channels(weight_kchw: Tensor, channels: int) -> Tensor:
    """Return the weight for another number of input channels, with the same sum over channels."""
    old = weight_kchw.shape[1]
    if channels <= old:
        return (weight_kchw.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1)
    extra = weight_kchw.mean(1, keepdim=True).repeat(1, channels - old, 1, 1)
    return torch.cat([weight_kchw, extra], dim=1) * (old / channels)


def _replace_conv_weight(conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    """Return the same layer with another weight; a subclass keeps what it does besides, such as padding."""
    made = copy.deepcopy(conv)
    made.in_channels = weight.shape[1]
    made.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    return made


def _set_submodule(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
