"""What a phase froze stayed as it was to the bit, and what it trained has moved: shown, not hoped."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.model.fsdp import any_rank, full_tensor, is_sharded, local_shard
from tuneforge.engine.model.model import Model
from tuneforge.errors import HaltError


def bitwise_equal(one: Tensor, other: Tensor) -> bool:
    """True where two tensors of one shape and type hold the same bits; NaN equals itself, 0.0 is not -0.0.

    Of sharded ones each rank compares its part, and all are told whether all parts are the same.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    same = torch.equal(_as_integers(local_shard(one)), _as_integers(local_shard(other)))
    return not any_rank(not same, one) if is_sharded(one) else same


@attrs.define(eq=False)
class FreezeCheck:
    """Evidence gathered over one phase.

    Args:
        before: Clones of every parameter and buffer that the phase may not move, and of what it trains, by name.
        frozen: Names of parameters and buffers that must stay.
        unmoved: Trained tensors not yet seen to move, and whether a gradient was due to move them since.
    """

    before: dict[str, Tensor]
    frozen: list[str]
    unmoved: dict[str, Tensor | None]

    def state(self) -> dict[str, Any]:
        """All of it as tensors and plain data."""
        due = {name: None if seen is None else bool(seen) for name, seen in self.unmoved.items()}
        return {"before": self.before, "frozen": self.frozen, "unmoved": due}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> FreezeCheck:
        """What `state` gave."""
        unmoved = {name: None if due is None else torch.tensor(due) for name, due in state["unmoved"].items()}
        return cls(before=state["before"], frozen=state["frozen"], unmoved=unmoved)

    @classmethod
    def begin(cls, model: Model, trainable: list[str], modes: list[tuple[nn.Module, bool]]) -> FreezeCheck:
        """Take the evidence from before the phase.

        Args:
            model: After `freeze`.
            trainable: Names of the parameters that train.
            modes: The modes of the phase; a norm in eval mode must keep its buffers.
        """
        still = _frozen_buffers(model.module, modes)
        frozen = [name for name in model.parameters() if name not in set(trainable)]
        tensors = _named_tensors(model.module)
        before = {name: tensors[name].detach().clone() for name in (*frozen, *still, *trainable)}
        return cls(before=before, frozen=[*frozen, *still], unmoved=dict.fromkeys(trainable))

    def observe(self, model: Model, groups: list[dict[str, Any]]) -> None:
        """Note which tensors not yet seen to move have a gradient that must move them; call it before each step.

        A gradient must move a tensor where the rate times it exceeds what rounding can swallow. Optimizers that
        normalise the gradient move it by more than that.

        Args:
            model: The model with gradients.
            groups: The optimizer's groups, for the present rates.
        """
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        named = model.parameters()
        for name, seen in self.unmoved.items():
            parameter = named[name]
            if parameter.grad is not None:
                smallest = (
                    torch.finfo(parameter.dtype).eps * parameter.detach().abs() + torch.finfo(parameter.dtype).tiny
                )
                gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                due = full_tensor((rates[id(parameter)] * gradient.abs() > smallest).any())
                self.unmoved[name] = due if seen is None else seen | due

    def update(self, model: Model) -> None:
        """Stop watching the tensors that have moved; most do at the first step, so this is cheap."""
        named = model.parameters()
        self.unmoved = {
            name: seen for name, seen in self.unmoved.items() if bitwise_equal(named[name].detach(), self.before[name])
        }

    def finish(self, model: Model) -> tuple[str, ...]:
        """Prove it.

        Returns:
            Names of trained tensors that never received a gradient: worth a warning.

        Raises:
            HaltError: A frozen tensor moved, or a trained one received gradients and did not move.
        """
        tensors = _named_tensors(model.module)
        moved = [name for name in self.frozen if not bitwise_equal(tensors[name].detach(), self.before[name])]
        if moved:
            raise HaltError(
                f"{len(moved)} frozen tensor(s) moved during the phase: {', '.join(moved[:5])}",
                why="what is frozen must stay the same to the bit",
                fix="look for code that writes to weights or buffers (an extension, or the model's own forward)",
            )
        self.update(model)
        stuck = [name for name, due in self.unmoved.items() if due is not None and bool(due)]
        if stuck:
            raise HaltError(
                f"{len(stuck)} tensor(s) that train have not moved: {', '.join(stuck[:5])}",
                why="each had a rate and a gradient large enough to move it, yet every bit is as before",
                fix="look for code that restores weights or replaces the optimizer (an extension, a wrapper)",
            )
        return tuple(name for name in model.parameters() if name in self.unmoved)  # a resumed run has another order


def _frozen_buffers(module: nn.Module, modes: list[tuple[nn.Module, bool]]) -> list[str]:
    """Names of the buffers that the phase may not move: those of modules in eval mode."""
    still = {id(buffer) for child, training in modes if not training for buffer in child.buffers(recurse=False)}
    moving = {id(buffer) for child, training in modes if training for buffer in child.buffers(recurse=False)}
    return [name for name, buffer in module.named_buffers() if id(buffer) in still - moving]


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_integers(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()]) if tensor.is_floating_point() else tensor
