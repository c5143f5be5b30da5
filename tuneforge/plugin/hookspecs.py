"""The hook points: the whole contract between the engine and its plugins, on one page.

Every hook takes one subject, so that signatures never have to change: what a plugin may know hangs on it.
How results combine is said in each docstring and enforced in `tuneforge.plugin.hooks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from tuneforge.engine.context.run import Run
    from tuneforge.engine.data.dataset import Batch, Data
    from tuneforge.engine.loop.metric_set import Metrics
    from tuneforge.engine.model.model import Model
    from tuneforge.plugin.results import TaskInfo
    from tuneforge.plugin.steps import StrategyStep

hookspec = pluggy.HookspecMarker("tuneforge")
hookimpl = pluggy.HookimplMarker("tuneforge")

PROVIDER_HOOKS = ("data_prepare", "train_step", "finetune_strategy", "optimizer_step")
"""Hooks that exactly one component answers; any number may wrap them."""

CHAINED_HOOKS = ("model_adapt", "evaluate")
"""Hooks that every component answers in turn, in the order in which the user named them."""

COMPONENT_GROUPS = ("data_prepare", "model_adapt", "train_step", "evaluate", "finetune_strategy", "callback")
"""Entry-point groups (after `tuneforge.`) of components that take part in a run through hooks."""

NON_HOOK_GROUPS = ("lr_schedule", "optimizer", "augment", "export", "inputs", "targets")
"""Entry-point groups (after `tuneforge.`) of parts that a run or a step asks for by name."""


class HookSpecs:
    """What a component may implement, in the order in which a run calls it."""

    @hookspec
    def run_started(self, run: Run) -> None:
        """Observe: configuration, folder and components exist; data and model do not yet."""

    @hookspec(firstresult=True)
    def data_prepare(self, run: Run) -> Data:  # type: ignore[empty-body]  # a contract has no body
        """Provide the splits and the contracts of inputs and targets. Exactly one provider."""

    @hookspec(firstresult=True)
    def model_adapt(self, run: Run, model: Model | None) -> Model:  # type: ignore[empty-body]
        """Build or change the model. A chain: the first gets `model=None` and builds, each next gets the last result.

        When `run.restoring` is true the weights follow from the run folder: build the shape, load nothing.
        Returning None is an error.
        """

    @hookspec(firstresult=True)
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:  # type: ignore[empty-body]
        """Say what to do: an iterable of steps, or a generator whose `yield` returns each step's answer.

        Exactly one provider. It never sees the live model or the test split.
        """

    @hookspec
    def phase_started(self, run: Run) -> None:
        """Observe: `run.phase` is about to train; freezing, modes and optimizer are set."""

    @hookspec(firstresult=True)
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Any]:  # type: ignore[empty-body]
        """Compute the loss of one batch. Exactly one provider; wrappers add to its loss.

        Call `run.forward(batch.inputs)`, never the module: in a frozen phase the engine runs only what changes.

        Returns:
            The scalar loss (mean over the batch), and the model's outputs.
        """

    @hookspec(firstresult=True)
    def optimizer_step(self, run: Run) -> None:
        """Apply the gradients. The engine's own; wrap it to clip, perturb or average."""

    @hookspec(firstresult=True)
    def evaluate(self, run: Run) -> Metrics:  # type: ignore[empty-body]
        """Give a fresh accumulator with `update(outputs, targets)` and `compute()` for one pass over a split.

        Figures of all components are merged; the same figure from two of them is an error.
        """

    @hookspec
    def evaluation_started(self, run: Run) -> None:
        """Observe: a split is about to be evaluated (averaged weights are swapped in here)."""

    @hookspec
    def evaluation_ended(self, run: Run) -> None:
        """Observe: the split has been evaluated."""

    @hookspec
    def epoch_ended(self, run: Run) -> None:
        """Observe: an epoch was trained and evaluated; its figures are in `run.history[-1]`."""

    @hookspec
    def phase_ended(self, run: Run) -> None:
        """Observe: the phase's training is over and proved; best weights are not restored yet."""

    @hookspec
    def run_ended(self, run: Run) -> None:
        """Observe: model and report are written."""
