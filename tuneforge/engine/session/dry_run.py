"""A dry run: the steps of a strategy that are known before the first is executed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import islice
from typing import Any

import attrs

from tuneforge.engine.context.run import Run
from tuneforge.engine.loop.batch_of_one import check_batch_of_one
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.loop.sample_weights import SamplingWeights
from tuneforge.engine.loop.validation import check_validation
from tuneforge.engine.model.freezing import select
from tuneforge.engine.model.optimizer import parameter_groups
from tuneforge.engine.session import messages
from tuneforge.engine.session.refit import decide_refit
from tuneforge.engine.session.run_log import build_task_info
from tuneforge.plugin.hooks import RegisteredComponent, iterate_strategy
from tuneforge.plugin.steps import Diagnosis, Phase, StrategyStep


@attrs.frozen
class DryRun:
    """The steps of a strategy that are known in advance.

    Args:
        strategy_steps: The steps, in order.
        depends_on_results: True if the strategy decides on further steps from the result of the last one.
        refit: True if the steps are repeated on training and validation samples at the end.
    """

    strategy_steps: tuple[StrategyStep, ...]
    depends_on_results: bool
    refit: bool = False


def collect_known_steps(
    run: Run, check_step_type: Callable[[Any, RegisteredComponent], StrategyStep], log: Callable[[str], None]
) -> DryRun:
    """Return the known steps of the run's strategy: all steps of a list, or the first step of a generator.

    Args:
        run: A run with data and model.
        check_step_type: Called with each step; raises an error if it is not a step.
        log: Called with the lines that describe the data and the model.

    Raises:
        SelectorError: A step names parameters that do not exist.
        UnknownNameError: A step names a schedule or an optimizer that is not installed.
    """
    for line in (
        *messages.format_data(run.config.data.name, run.data),
        *messages.format_model(run.config.model.name, run.model),
    ):
        log(line)
    member = run.hooks.get_provider("finetune_strategy")
    steps_or_generator = run.hooks.call.finetune_strategy(task=build_task_info(run))
    steps = iterate_strategy(member, steps_or_generator)
    is_generator = hasattr(steps_or_generator, "send") or inspect.isgeneratorfunction(
        getattr(type(steps_or_generator), "__iter__", None)
    )
    known = tuple(check_step_type(step, member) for step in (islice(steps, 1) if is_generator else steps))
    steps.close()
    for step in known:
        validate_step(run, step)
    return DryRun(known, depends_on_results=is_generator and bool(known), refit=decide_refit(run))


def validate_step(run: Run, step: StrategyStep) -> None:
    """Check that everything a step names exists, so that an error shows before an earlier step has trained.

    Raises:
        SelectorError: The step names parameters that do not exist.
        UnknownNameError: The step names a schedule or an optimizer that is not installed.
        OptionError: An option of one of them is wrong.
        UsageError: A batch of one sample cannot train a norm layer.
        DataError: The step samples or weights classes or sample groups that the data does not have, or it decides by
            a validation split that is empty.
    """
    check_validation(run, step)
    if isinstance(step, (Phase, Diagnosis)):
        trainable = select(run.model, step.train)
    if isinstance(step, Phase):
        SamplingWeights.from_phase(run, step)
        check_batch_of_one(run, step, trainable)
        components = PhaseComponents(run.config)
        components.build_schedule(step)
        parameter_groups(run.model, step, trainable, weight_decay=components.peek_optimizer(step).weight_decay)
