"""The head of a model: the layer that computes the outputs, and its replacement for another number of classes.

Shapes: k outputs, f features.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import nn

from tuneforge import Model, PluginError, SampleRNG

HeadLayer: TypeAlias = nn.Linear | nn.Conv2d

_INIT_STD = 0.01  # small beside trained rows, so that new classes do not dominate the first predictions


def get_head_layer(model: Model) -> HeadLayer:
    """Return the head of the model.

    Raises:
        PluginError: It is neither a linear layer nor a 1x1 convolution.
    """
    head = model.head_module()
    if isinstance(head, nn.Linear) or (isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1) and head.groups == 1):
        return head
    raise PluginError(
        f"the head '{model.head}' is a {type(head).__name__}",
        where="--adapt head",
        why="only a linear layer or a 1x1 convolution can be resized",
        fix="name the output layer of the model as its head",
    )


def num_head_outputs(head: HeadLayer) -> int:
    """Return the number of outputs of a head."""
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels


def resize_head(head: HeadLayer, num_outputs: int, rows: dict[int, int], *, seed: int) -> HeadLayer:
    """Return a layer of the same kind with `num_outputs` outputs.

    Args:
        head: The old layer.
        num_outputs: k.
        rows: Old row by new row; the others are randomly initialized.
        seed: Seed of the run.
    """
    old = head.weight.detach()
    random_kf = SampleRNG(seed, 0, torch.arange(num_outputs)).normal("head", old[0].numel()) * _INIT_STD
    weight = random_kf.reshape(num_outputs, *old.shape[1:]).to(old)
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
