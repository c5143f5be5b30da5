"""Weights of a safetensors file for a network built in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tuneforge import UsageError


def load_matching_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, kind: str, fix: str) -> None:
    """Load tensors into a network whose state has the same names and shapes, cast to float32.

    Args:
        module: The network, changed in place.
        tensors: Its weights by name.
        path: The file that holds them, for the message.
        kind: What the network is called, for the message.
        fix: What the message advises.

    Raises:
        UsageError: A name or a shape differs.
    """
    expected = module.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += [name for name in expected if name in tensors and expected[name].shape != tensors[name].shape]
    if wrong:
        raise UsageError(
            f"'{path}' does not hold the weights of {kind}: {', '.join(wrong[:5])}",
            where="--model.weights",
            why=f"{len(wrong)} name(s) or shape(s) differ",
            fix=fix,
        )
    module.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
