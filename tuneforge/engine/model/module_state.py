"""The tensors of a module as a whole: collected by name, restored, and compared bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tuneforge.engine.model.fsdp import any_rank, is_sharded, local_shard, shard_like

_INTEGER_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, detached; non-persistent buffers too, a shared tensor once."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def restore_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors of a `full_state` back into the module, in place."""
    own = full_state(module)
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(shard_like(own[name], tensor))


def bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors have the same type, shape and bits: NaN equals itself, and 0.0 is not -0.0.

    Of sharded tensors each rank compares its shard, and every rank gets the common result.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    equal = torch.equal(_as_integers(local_shard(one)), _as_integers(local_shard(other)))
    return not any_rank(not equal, one) if is_sharded(one) else equal


def _as_integers(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGER_TYPES[tensor.element_size()]) if tensor.is_floating_point() else tensor
