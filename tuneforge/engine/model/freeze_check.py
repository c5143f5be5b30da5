"""The freeze check: after each phase, frozen tensors must be bit-identical and trained ones must have changed."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.model.fsdp import full_tensor, is_sharded
from tuneforge.engine.model.model import Model
from tuneforge.engine.model.modes import Modes
from tuneforge.engine.model.module_state import bitwise_equal, full_state
from tuneforge.errors import HaltError, PluginError

_MAX_UNCHANGED = 0.1  # share of unchanged weights from which a phase says so: some always have no gradient


@attrs.define(eq=False)
class FreezeCheck:
    """The tensors of one phase as they were before it, and which trained ones have not changed yet.

    Args:
        before: Clones, by name, of the tensors that the phase may not change and of those that it trains.
        frozen: Names of the parameters and buffers that must not change.
        unmoved: For each trained tensor that has not changed yet: None before its first gradient, then whether a
            gradient so far was large enough to change it.
    """

    before: dict[str, Tensor]
    frozen: list[str]
    unmoved: dict[str, Tensor | None]

    def state(self) -> dict[str, Any]:
        """Return the check as tensors and plain data, for a checkpoint."""
        due = {name: None if seen is None else bool(seen) for name, seen in self.unmoved.items()}
        return {"before": self.before, "frozen": self.frozen, "unmoved": due}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> FreezeCheck:
        """Return the check that `state` returned."""
        unmoved = {name: None if due is None else torch.tensor(due) for name, due in state["unmoved"].items()}
        return cls(before=state["before"], frozen=state["frozen"], unmoved=unmoved)

    @classmethod
    def begin(cls, model: Model, trainable: list[str], modes: Modes) -> FreezeCheck:
        """Clone the tensors before the phase.

        Args:
            model: The model, after `freeze`.
            trainable: Names of the parameters that train.
            modes: The modes of the phase; a norm layer in eval mode must not change its running statistics.

        Raises:
            PluginError: A frozen tensor shares its memory with a trained one.
        """
        frozen_buffers = _frozen_buffers(model.module, modes)
        frozen = [name for name in model.parameters() if name not in set(trainable)]
        tensors = full_state(model.module)
        _check_no_shared_memory(tensors, [*frozen, *frozen_buffers], trainable)
        before = {name: tensors[name].clone() for name in (*frozen, *frozen_buffers, *trainable)}
        return cls(before=before, frozen=[*frozen, *frozen_buffers], unmoved=dict.fromkeys(trainable))

    def observe(self, model: Model, groups: list[dict[str, Any]]) -> None:
        """Note which tensors that have not changed yet have a gradient that must change them. Call before each step.

        A plain SGD update changes a weight if lr times the gradient exceeds the rounding error of the weight. Adaptive
        optimizers normalize the gradient and change it by more than that, so the condition holds for them too.

        Args:
            model: The model with gradients.
            groups: The optimizer's parameter groups with their present learning rates.
        """
        lrs = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        named = model.parameters()
        for name, seen in self.unmoved.items():
            parameter = named[name]
            if parameter.grad is not None:
                rounding_error = (
                    torch.finfo(parameter.dtype).eps * parameter.detach().abs() + torch.finfo(parameter.dtype).tiny
                )
                gradient = (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad).abs()
                if _is_coarse(parameter):  # an adaptive optimizer scales a large gradient down, to about 1
                    gradient = gradient.clamp(max=1)
                due = full_tensor((lrs[id(parameter)] * gradient > rounding_error).any())
                self.unmoved[name] = due if seen is None else seen | due

    def update(self, model: Model) -> None:
        """Drop the tensors that have changed. Most change in the first step, so this is cheap afterwards."""
        named = model.parameters()
        self.unmoved = {
            name: seen for name, seen in self.unmoved.items() if bitwise_equal(named[name].detach(), self.before[name])
        }

    def describe_rounding(self, model: Model) -> str:
        """Return a sentence if updates of bfloat16 or float16 weights were lost to rounding, else ""."""
        named = {name: each for name, each in model.parameters().items() if each.requires_grad and _is_coarse(each)}
        unchanged = sum(int((full_tensor(each.detach() == self.before[name])).sum()) for name, each in named.items())
        total = sum(each.numel() for each in named.values())
        if unchanged <= _MAX_UNCHANGED * total:
            return ""
        dtypes = sorted({str(each.dtype).removeprefix("torch.") for each in named.values()})
        return (
            f"{unchanged / total:.0%} of the trained weights in {' and '.join(dtypes)} are what they were: an update "
            "smaller than the spacing of the dtype is rounded away; raise the learning rate, or train float32 weights "
            "(module.float()), perhaps with --precision bf16"
        )

    def finish(self, model: Model) -> tuple[str, ...]:
        """Check every tensor after the phase.

        Returns:
            Names of trained tensors that never received a gradient, to warn about.

        Raises:
            HaltError: A frozen tensor changed, or a trained one had gradients and did not change.
        """
        tensors = full_state(model.module)
        changed = [name for name in self.frozen if not bitwise_equal(tensors[name], self.before[name])]
        if changed:
            raise HaltError(
                f"{len(changed)} frozen tensor(s) changed during the phase: {', '.join(changed[:5])}",
                why="frozen tensors must stay bit-identical",
                fix="look for code that writes to weights or buffers (a callback, or the model's own forward)",
            )
        self.update(model)
        unchanged = [name for name, due in self.unmoved.items() if due is not None and bool(due)]
        if unchanged:
            raise HaltError(
                f"{len(unchanged)} trained tensor(s) have not changed: {', '.join(unchanged[:5])}",
                why="each had a learning rate and a gradient large enough to change it, yet it is bit-identical",
                fix="look for code that restores weights or replaces the optimizer (a callback, a wrapper)",
            )
        return tuple(
            name for name in model.parameters() if name in self.unmoved
        )  # a resumed run has `unmoved` in another order


def _is_coarse(parameter: Tensor) -> bool:
    """Return True for bfloat16 and float16, in which steps of usual size are lost to rounding."""
    return torch.finfo(parameter.dtype).bits < 32


def _check_no_shared_memory(tensors: Mapping[str, Tensor], frozen: list[str], trainable: list[str]) -> None:
    """Check that no frozen tensor lies in the memory of a trained one, as two parameters with one `data` do.

    Raises:
        PluginError: One does.
    """
    owners = {each: name for name in trainable for each in _memory_ranges(tensors[name])}
    starts = sorted(owners)
    for name in frozen:
        for start, end in _memory_ranges(tensors[name]):
            at = bisect.bisect_left(starts, (end, 0))
            if at and starts[at - 1][1] > start:
                raise PluginError(
                    f"'{name}' is frozen and shares its memory with '{owners[starts[at - 1]]}', which trains",
                    why="an update of one changes the other",
                    fix=f"train both, or give '{name}' a copy: tensor.data = tensor.data.clone()",
                )


def _memory_ranges(tensor: Tensor) -> list[tuple[int, int]]:
    """Return the bytes that a tensor covers, as one range (start, end); none where it does not cover all between."""
    if tensor.layout is not torch.strided or is_sharded(tensor) or not tensor.numel():
        return []
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return [(start, start + extent * tensor.element_size())] if extent == tensor.numel() else []


def _frozen_buffers(module: nn.Module, modes: Modes) -> list[str]:
    """Return the names of the buffers that the phase may not change: those of modules in eval mode."""
    fixed = {id(buffer) for child, training in modes if not training for buffer in child.buffers(recurse=False)}
    updated = {id(buffer) for child, training in modes if training for buffer in child.buffers(recurse=False)}
    return [name for name, buffer in module.named_buffers() if id(buffer) in fixed - updated]
