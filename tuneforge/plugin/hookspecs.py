"""The hook specifications: the interface between the engine and its plugins.

Every hook takes one main argument, whose attributes hold all that a plugin may use, so that signatures stay stable.
Each docstring says how results are combined; `tuneforge.plugin.hooks` enforces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from tuneforge.engine.context.run import Run
    from tuneforge.engine.data.dataset import Batch, Data
    from tuneforge.engine.loop.metric_set import Metrics
    from tuneforge.engine.model.model import Model
    from tuneforge.plugin.image_preprocessing import ImagePreprocessing
    from tuneforge.plugin.results import AnyStrategyStepResult, TaskInfo
    from tuneforge.plugin.steps import StrategyStep

hookspec = pluggy.HookspecMarker("tuneforge")
hookimpl = pluggy.HookimplMarker("tuneforge")

PROVIDER_HOOKS = ("data_prepare", "train_step", "finetune_strategy", "optimizer_step")
"""Hooks that exactly one component implements; any number may wrap them."""

CHAINED_HOOKS = ("model_adapt", "evaluate")
"""Hooks that all components implement in turn, in the order in which the user named them."""

EXIT_HOOKS = ("run_stopped", "run_failed")
"""Hooks that are called while an error leaves the run; an error in one of them is logged."""

COMPONENT_GROUPS = ("data_prepare", "model_adapt", "train_step", "evaluate", "finetune_strategy", "callback")
"""Entry-point groups (after `tuneforge.`) of components that implement hooks."""

NON_HOOK_GROUPS = ("lr_schedule", "optimizer", "augment", "export", "inputs", "targets")
"""Entry-point groups (after `tuneforge.`) of components that a run or a step refers to by name."""


class HookSpecs:
    """The hooks that a component may implement, in the order in which a run calls them."""

    @hookspec
    def run_started(self, run: Run) -> None:
        """Observe the start: configuration, run directory and components exist; data and model do not yet.

        In a resumed run `run.resumed` is true, and `run.state(self)`, `run.history`, `run.step` and `run.epoch` are
        those of the checkpoint.
        """

    @hookspec(firstresult=True)
    def model_inputs(self, run: Run) -> ImagePreprocessing | None:
        """Return how the weights of the model expect their inputs; at most one component implements it.

        It is called before `data_prepare`, so that wrong names of models and weights are errors before data is read.
        Its result is `run.expected_inputs`, which sources of data follow where the user gives no value. If
        `run.restoring` is true, the run is resumed, and the weights may be gone.
        """

    @hookspec(firstresult=True)
    def data_prepare(self, run: Run) -> Data:  # type: ignore[empty-body]  # a contract has no body
        """Return the splits with inputs and targets. Exactly one component implements it."""

    @hookspec(firstresult=True)
    def model_adapt(self, run: Run, model: Model | None) -> Model:  # type: ignore[empty-body]
        """Build or change the model. The first component gets `model=None` and builds it; the next ones change it.

        If `run.restoring` is true, the weights are loaded from the run directory afterwards: build the architecture
        without loading weights. Returning None is an error.
        """

    @hookspec(firstresult=True)
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:  # type: ignore[empty-body]
        """Return an iterable of steps, or a generator whose `yield` returns the result of each step.

        Exactly one component implements it. It has no access to the model or the test split.
        """

    @hookspec
    def strategy_step_started(self, run: Run, step: StrategyStep) -> None:
        """Observe that a step of the strategy begins, of whatever kind."""

    @hookspec
    def phase_started(self, run: Run) -> None:
        """Observe that `run.phase` is about to train; freezing, modes and optimizer are set."""

    @hookspec
    def phase_resumed(self, run: Run) -> None:
        """Observe that a resumed run goes on with `run.phase`, which had started before.

        It is called in place of `phase_started`, so that what a component sets up there is set up once.
        """

    @hookspec(firstresult=True)
    def train_step(self, run: Run, batch: Batch) -> tuple[Tensor, Any]:  # type: ignore[empty-body]
        """Compute the loss of one batch. Exactly one component implements it; wrappers add to its loss.

        Call `run.forward(batch.inputs)`, not the module, because the engine skips the frozen backbone if its features
        are cached.

        Returns:
            The scalar loss (mean over the batch), and the outputs of the model.
        """

    @hookspec(firstresult=True)
    def optimizer_step(self, run: Run) -> None:
        """Apply the gradients. The engine implements it; wrap it to clip gradients or average weights."""

    @hookspec(firstresult=True)
    def evaluate(self, run: Run) -> Metrics:  # type: ignore[empty-body]
        """Return a new metric object with `update(outputs, targets)` and `compute()` for one pass over a split.

        The metrics of all components are merged; the same metric from two of them is an error.
        """

    @hookspec
    def evaluation_started(self, run: Run) -> None:
        """Observe that a split is about to be evaluated; averaged weights are swapped in here."""

    @hookspec
    def evaluation_ended(self, run: Run, metrics: Mapping[str, Any]) -> None:
        """Observe that the split `run.eval_split` has been evaluated, with its metrics by name."""

    @hookspec
    def epoch_ended(self, run: Run) -> None:
        """Observe that an epoch was trained and evaluated; its metrics are in `run.history[-1]`."""

    @hookspec
    def phase_ended(self, run: Run) -> None:
        """Observe that the phase has ended and passed the freeze check; best weights are not restored yet."""

    @hookspec
    def strategy_step_ended(self, run: Run, step: StrategyStep, result: AnyStrategyStepResult) -> None:
        """Observe that a step of the strategy is completed, and its result, which the strategy gets next."""

    @hookspec
    def run_ended(self, run: Run, report: Mapping[str, Any]) -> None:
        """Observe that model and report are written; `report` is the content of `report.json`."""

    @hookspec
    def run_stopped(self, run: Run, error: BaseException) -> None:
        """Observe that the run was stopped (a signal, Ctrl-C, `Engine.stop`) and can be resumed.

        No other hook is called afterwards, and `error` leaves `Engine.run`, whatever happens here.
        """

    @hookspec
    def run_failed(self, run: Run, error: BaseException) -> None:
        """Observe that the run failed. As in `run_stopped`, `error` leaves `Engine.run`, whatever happens here."""
