"""Faulty strategies: each has one fault that the conformance kit must find."""

from __future__ import annotations

import random

import torch

import tuneforge as tf
from tuneforge.plugin import StrategyStep

PHASES = (
    tf.Phase("head-first", train="head", epochs=1, lr=0.01),
    tf.Phase("then-all", epochs=1, lr=0.01),
)


class Plain:
    """The base class: the head trains first, then all layers."""

    @tf.hookimpl
    def finetune_strategy(self) -> list[StrategyStep]:
        return list(PHASES)


@tf.component(api=1)
class StateInAttribute(Plain):
    """Counts its steps in an attribute, which checkpoints do not save."""

    @tf.hookimpl(wrapper=True)
    def train_step(self):
        loss, outputs = yield
        self.__dict__["count"] = self.__dict__.get("count", 0) + 1
        return loss * (1 + 0.1 * self.__dict__["count"]), outputs


@tf.component(api=1)
class RandomLearningRate:
    """Draws a random learning rate, so that a resumed run yields another step."""

    @tf.hookimpl
    def finetune_strategy(self) -> list[StrategyStep]:
        return [tf.Phase("all", epochs=1, lr=random.SystemRandom().uniform(1e-4, 1e-3))]


@tf.component(api=1)
class CountsTrainStepCalls(Plain):
    """Changes the loss by the number of calls of `train_step`, which a diagnosis calls too."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run: tf.Run):
        state = run.state(self)
        state["calls"] = state.get("calls", 0) + 1
        loss, outputs = yield
        return loss * (1 + 0.1 * state["calls"]), outputs


@tf.component(api=1)
class NormsInTrainingMode(Plain):
    """Calls `.train()` right before the forward pass."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run: tf.Run):
        run.model.module.train()
        result = yield
        return result


@tf.component(api=1)
class WritesBatchNormStatistics(Plain):
    """Changes the statistics of every norm after each evaluation."""

    @tf.hookimpl
    def evaluation_ended(self, run: tf.Run) -> None:
        for name, buffer in run.model.module.named_buffers():
            if name.endswith("running_mean"):
                buffer += 1e-3


@tf.component(api=1)
class DecaysFrozenWeights(Plain):
    """Applies weight decay to every parameter, including frozen ones."""

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run: tf.Run):
        result = yield
        with torch.no_grad():
            for parameter in run.model.parameters().values():
                parameter *= 1 - 1e-3
        return result


@tf.component(api=1)
class UnfreezesWithoutEngine(Plain):
    """Sets `requires_grad` of parameters that no optimizer holds."""

    @tf.hookimpl
    def phase_started(self, run: tf.Run) -> None:
        for parameter in run.model.parameters().values():
            parameter.requires_grad_(True)


@tf.component(api=1)
class RankDependentUpdate(Plain):
    """Adds a value to the weights that depends on the rank."""

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run: tf.Run):
        result = yield
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        with torch.no_grad():
            for parameter in run.model.parameters().values():
                if parameter.requires_grad:
                    parameter += 1e-4 * rank
        return result
