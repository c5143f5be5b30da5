"""A batch of inputs as one tensor or a mapping of tensors, and what is done to each tensor of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TensorTree = Tensor | Mapping[str, Tensor]
"""A batch of inputs: one tensor, or a mapping of tensors. The first axis is the batch."""


def map_inputs(inputs: TensorTree, fn: Callable[[Tensor], Tensor]) -> TensorTree:
    """Apply `fn` to the tensor, or to each tensor of the mapping."""
    if isinstance(inputs, Tensor):
        return fn(inputs)
    return {name: fn(tensor) for name, tensor in inputs.items()}


def clone_inputs(inputs: Any) -> Any:
    """Return a copy of prepared inputs, which a model may overwrite; inputs of other types are returned as they are."""
    return map_inputs(inputs, torch.clone) if isinstance(inputs, (Tensor, Mapping)) else inputs


def named_tensors(inputs: TensorTree) -> dict[str, Tensor]:
    """Return the tensors by name; a single tensor gets the name `""`."""
    return {"": inputs} if isinstance(inputs, Tensor) else dict(inputs)


def stack_inputs(samples: Sequence[TensorTree]) -> TensorTree:
    """Return a batch of samples that have no batch axis yet; all samples need equal shapes."""
    return _join(samples, torch.stack)


def concatenate_inputs(batches: Sequence[TensorTree]) -> TensorTree:
    """Return one batch with the samples of all batches."""
    return _join(batches, torch.cat)


def _join(inputs: Sequence[TensorTree], join: Callable[[list[Tensor]], Tensor]) -> TensorTree:
    named = [named_tensors(each) for each in inputs]
    joined = {name: join([each[name] for each in named]) for name in named[0]}
    return joined[""] if isinstance(inputs[0], Tensor) else joined
