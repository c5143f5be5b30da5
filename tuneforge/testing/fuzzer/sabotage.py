"""A callback that breaks what a phase promises: it writes to a frozen tensor, or undoes each step of a trained one."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from tuneforge import Run, hookimpl


class Saboteur:
    """Breaks one promise in the first phase in which that is possible.

    Args:
        seed: Decides which tensor is written to.
        position: The part of the phase after which it is, in [0, 1).

    Attributes:
        target: What was done, as the beginning of a sentence; "" as long as nothing was.
        may_warn: True if a tensor is held whose gradients were too small to change it for sure: a warning will do.
    """

    def __init__(self, seed: int, position: float) -> None:
        self.target, self.may_warn = "", False
        self._random, self._position = random.Random(seed), position  # noqa: S311 - not for security
        self._held: tuple[Tensor, Tensor] | None = None

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Choose in every fourth program to hold the weight of the head, if it trains and is not averaged."""
        weight = run.model.parameters().get(f"{run.model.head}.weight")
        averaged = any(member.name == "ema" for member in run.hooks.components)
        if (
            not averaged
            and not self.target
            and weight is not None
            and weight.requires_grad
            and self._random.random() < 0.25
        ):
            self.target = "the weight of the head is set back after each step"
            self._held = weight, weight.detach().clone()
            self.may_warn = True

    @hookimpl(wrapper=True)
    def optimizer_step(self, run: Run) -> Generator[None, Any, Any]:
        """Write after the step."""
        optimizer = run.optimization.optimizer
        if self._held is not None and self.may_warn and optimizer is not None:
            groups = optimizer.param_groups
            lrs = {id(each): group["lr"] for group in groups for each in group["params"]}
            self.may_warn = not _must_change(self._held[0], lrs.get(id(self._held[0]), 0.0))
        result = yield
        with torch.no_grad():
            if self._held is not None:
                self._held[0].copy_(self._held[1])
            elif not self.target and (run.steps_done + 1) / run.total_steps > self._position:
                self._overwrite(run)
        return result

    def _overwrite(self, run: Run) -> None:
        tensors = {name: each for name, each in run.model.parameters().items() if not each.requires_grad}
        buffers = {
            name: each
            for path, module in run.model.module.named_modules()
            if not module.training
            for name, each in module.named_buffers(path, recurse=False)
        }
        if buffers and (not tensors or self._random.random() < 0.5):
            tensors = buffers
        if tensors:
            name = self._random.choice(sorted(tensors))
            self.target = f"'{name}' is frozen and was overwritten"
            tensors[name].add_(1)

    def warned(self, log: Iterable[str]) -> Iterator[str]:
        """Yield the warnings that name the head's weight among the parameters that have not changed."""
        return (line for line in log if "one too small to change them" in line and "head.weight" in line)


def _must_change(parameter: Tensor, lr: float) -> bool:
    """Return True if the gradient must change a weight: a step of plain SGD exceeds its rounding error by far."""
    if parameter.grad is None:
        return False
    update = lr * parameter.grad.detach().abs()
    return bool((update > 4 * torch.finfo(parameter.dtype).eps * parameter.detach().abs()).any())
