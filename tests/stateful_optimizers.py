"""Optimizers with state outside the tensors of a parameter: counts in groups and attributes, and two modes."""

from __future__ import annotations

from typing import Any

import torch

import tuneforge as tf


class CountingMomentum(torch.optim.Optimizer):
    """Steps along a running mean of the gradient, corrected for its start by a count of the steps.

    Args:
        groups: Parameter groups.
        place: Where the count is: in the `group`, as a tensor in the `group-tensor`, an `attribute`, or under a key of
            its own in the state (`shared`).
    """

    def __init__(self, groups: list[dict[str, Any]], place: str) -> None:
        super().__init__(groups, {"lr": 0.05, "weight_decay": 0.0, "count": 0})
        self.place, self.count = place, 0

    def _next_count(self, group: dict[str, Any], *, first: bool) -> float:
        if self.place == "group":
            group["count"] += 1
            return float(group["count"])
        if self.place == "group-tensor":
            group["counted"] = group.get("counted", torch.zeros(())) + 1
            return float(group["counted"])
        if self.place == "attribute":
            self.count += first
            return float(self.count)
        self.state["all"]["count"] = self.state["all"].get("count", 0) + first
        return float(self.state["all"]["count"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for number, group in enumerate(self.param_groups):
            count = self._next_count(group, first=number == 0)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.mul_(0.9).add_(parameter.grad, alpha=0.1)
                    parameter.add_(mean / (1 - 0.9**count), alpha=-group["lr"])


class Averaging(torch.optim.Optimizer):
    """Gradient descent; in eval mode the parameters are a mean of all iterates, weighted by a count in the group."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.05, "weight_decay": 0.0, "train_mode": False, "k": 0})

    def train(self) -> None:
        self._switch(training=True)

    def eval(self) -> None:
        self._switch(training=False)

    @torch.no_grad()
    def _switch(self, *, training: bool) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if training != group["train_mode"] and "other" in self.state[parameter]:
                    kept = parameter.clone()
                    parameter.copy_(self.state[parameter]["other"])
                    self.state[parameter]["other"].copy_(kept)
            group["train_mode"] = training

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"], "call train() first"
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
                    mean = self.state[parameter].setdefault("other", torch.zeros_like(parameter))
                    mean.lerp_(parameter, 1 / group["k"])


@tf.component(api=1)
class Counting:
    """`CountingMomentum`."""

    place: str = tf.option(default="group", help="Where the count is.")
    weight_decay: float = tf.option(default=0.0, help="Not used.")

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        return CountingMomentum(groups, self.place)


@tf.component(api=1)
class WithModes:
    """`Averaging`."""

    weight_decay: float = tf.option(default=0.0, help="Not used.")

    def make(self, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
        return Averaging(groups)
