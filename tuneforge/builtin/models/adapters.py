"""Adapters: small changes to a model on its way into the run. Each says what it changed.

Shapes: k outputs, f features, c channels, h and w pixels of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from tuneforge import Model, PluginError, SampleRNG, between, component, gt, hookimpl, option

if TYPE_CHECKING:
    from tuneforge import Run

HeadLayer: TypeAlias = nn.Linear | nn.Conv2d

_INIT_STD = 0.01  # of new rows: small beside trained ones, so that they do not speak first


@component(api=1)
class Head:
    """Fit the head to the data's classes: rows of classes that both know, by name, are kept."""

    keep: bool = option(default=True, help="Keep the rows of classes that the model knows by name.")

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Replace the head, unless its outputs are the data's already.

        Raises:
            PluginError: There is no model, or its head is neither linear nor a 1x1 convolution.
        """
        model = _require_model(model, "head")
        head = get_head_layer(model)
        labels, size = run.data.targets.labels, run.data.targets.num_outputs
        if _num_outputs(head) == size and model.labels in ((), labels):
            known = (
                model.pretrained_labels if model.labels else labels
            )  # whose names are not known is taken at its word
            return attrs.evolve(model, labels=labels, pretrained_labels=known)
        kept = [name for name in labels if self.keep and name in model.labels]
        rows = {labels.index(name): model.labels.index(name) for name in kept}
        module = resize_head(head, size, rows, seed=run.config.seed)
        changed = model.with_head(module, labels=labels, pretrained_labels=tuple(kept))
        return changed.with_change(_describe_resize(_num_outputs(head), size, kept, labels))


@component(api=1)
class InputChannels:
    """Give the first convolution another number of input channels; answers to grey pictures stay the same."""

    channels: int = option(default=1, help="Channels of the pictures.", check=gt(0))

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Replace the first convolution, unless it fits.

        Colours become fewer by summing their weights. More channels share the weights: each old one keeps its own,
        each new one gets their mean, and all are scaled so that their sum is the same.

        Raises:
            PluginError: There is no model, no plain convolution, or one that mixes its input by itself.
        """
        del run
        model = _require_model(model, "input-channels")
        name, conv = _first_conv(model)
        if conv.in_channels == self.channels:
            return model
        if getattr(model.module, "transform_input", False):
            raise PluginError(
                f"{type(model.module).__name__} with these weights takes three channels only",
                why="it rescales red, green and blue by itself (transform_input)",
                fix="leave input-channels out and use --data.channels 3",
            )
        old = conv.in_channels
        _set_submodule(
            model.module, name, _replace_conv_weight(conv, _change_weight_channels(conv.weight.detach(), self.channels))
        )
        return model.with_change(f"input: {old} -> {self.channels} channels ('{name}')")


@component(api=1)
class Dropout:
    """Drop features at random before the head, while training."""

    p: float = option(default=0.5, help="Share of the features that is dropped.", check=between(0, 1))

    @hookimpl
    def model_adapt(self, run: Run, model: Model | None) -> Model:
        """Put dropout before the head; its parameters stay in their layer group.

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
        raise PluginError(
            f"adapter '{name}' was given no model", where="--model", fix=f"name a model first, and then --adapt {name}"
        )
    return model


def get_head_layer(model: Model) -> HeadLayer:
    """The layer that gives the answer.

    Raises:
        PluginError: It is neither linear nor a 1x1 convolution.
    """
    head = model.head_module()
    if isinstance(head, nn.Linear) or (isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1) and head.groups == 1):
        return head
    raise PluginError(
        f"the head '{model.head}' is a {type(head).__name__}",
        where="--adapt head",
        why="only a linear layer or a 1x1 convolution can be resized",
        fix="let the model name its answering layer as the head",
    )


def _num_outputs(head: HeadLayer) -> int:
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels


def resize_head(head: HeadLayer, num_outputs: int, rows: dict[int, int], *, seed: int) -> HeadLayer:
    """A layer of the same kind with `num_outputs` outputs.

    Args:
        head: The old layer.
        num_outputs: k.
        rows: Old row by new row; the others start fresh, from the seed.
        seed: The run's.
    """
    old = head.weight.detach()
    fresh_kf = SampleRNG(seed, 0, torch.arange(num_outputs)).normal("head", old[0].numel()) * _INIT_STD
    weight = fresh_kf.reshape(num_outputs, *old.shape[1:]).to(old)
    bias = old.new_zeros(num_outputs)
    for new, kept in rows.items():
        weight[new] = old[kept]
        if head.bias is not None:
            bias[new] = head.bias.detach()[kept]
    made: HeadLayer
    if isinstance(head, nn.Linear):
        made = nn.Linear(head.in_features, num_outputs, bias=head.bias is not None, device="meta")
    else:
        made = nn.Conv2d(head.in_channels, num_outputs, 1, bias=head.bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    if head.bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def _describe_resize(old: int, new: int, kept: Sequence[str], labels: Sequence[str]) -> str:
    fresh = [name for name in labels if name not in set(kept)]
    sentence = f"head: {old} -> {new} outputs"
    if not kept:
        return f"{sentence}, all fresh"
    return f"{sentence}, kept the rows of {_abbreviate(kept)}" + (f"; fresh: {_abbreviate(fresh)}" if fresh else "")


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"


def _first_conv(model: Model) -> tuple[str, nn.Conv2d]:
    """The first convolution in order of registration, which in all of torchvision's models sees the picture."""
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return name, module
    raise PluginError(
        f"{type(model.module).__name__} has no convolution", where="--adapt input-channels", fix="leave the adapter out"
    )


def _change_weight_channels(weight_kchw: Tensor, channels: int) -> Tensor:
    """The weight for another number of input channels, the sum over them unchanged."""
    old = weight_kchw.shape[1]
    if channels <= old:
        return (weight_kchw.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1)
    extra = weight_kchw.mean(1, keepdim=True).repeat(1, channels - old, 1, 1)
    return torch.cat([weight_kchw, extra], dim=1) * (old / channels)


def _replace_conv_weight(conv: nn.Conv2d, weight: Tensor) -> nn.Conv2d:
    made = nn.Conv2d(
        weight.shape[1],
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]  # a tuple of two, which torch's stubs do not say
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    made.weight = nn.Parameter(weight)
    made.bias = conv.bias
    return made


def _set_submodule(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)
